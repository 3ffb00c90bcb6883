"""Frames into files, as they come: MP4, WebM, GIF, PNG sequences, single pictures.

    with VideoWriter("ball.mp4", width=832, height=480, fps=16, metadata={"model": "pocket"}) as writer:
        for frame in frames:
            writer.write(frame)

A file is written beside its target as `<name>.part` and renamed when it is complete: the target is either the
old file or the whole new one. The same frames and metadata give the same bytes, on any number of cores: no
timestamps, no random ids, and encoders with a fixed number of threads.

Colours: sRGB frames are converted to BT.709 limited range and the file says so (untagged files are shown too
dark or too green by one player or the other). H.264 with 4:2:0 chroma needs even sizes: an odd last row or
column is repeated once, so 833x481 becomes 834x482. All other formats keep odd sizes.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import av
import av.filter
import numpy as np
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from mutoscope.errors import MediaError, MutoscopeError, ResourceError
from mutoscope.media.frames import check_frames
from mutoscope.media.read import EXACT_COLOURS, MAX_FPS, MAX_PIXELS, probe
from mutoscope.request import FramesHWC

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""The disk is full, a quota is used up, a file may not become larger."""

ENCODER_THREADS = 4
"""Fixed, because x264 and libvpx write other bytes with another number of threads."""
METADATA_KEY = "mutoscope"
"""Metadata is one JSON object under this key, in the comment of the container: {"mutoscope": {...}}."""

_PATTERN = re.compile(r"%0?\d*d")


@dataclass(frozen=True, kw_only=True)
class _Job:
    """What an encoder is told."""

    width: int
    height: int
    fps: Fraction
    comment: str | None


class _Encoder(ABC):
    """One format. `path` is the temporary place, which the writer moves; close comes once, at the end."""

    def __init__(self, path: Path, job: _Job) -> None:
        self.path, self.job = path, job

    @abstractmethod
    def write(self, frame: FramesHWC) -> None: ...

    @abstractmethod
    def close(self) -> None: ...

    @abstractmethod
    def abort(self) -> None:
        """Let go of the file without finishing it; must not raise."""


@dataclass(frozen=True, kw_only=True)
class _Codec:
    """How FFmpeg writes one kind of video file."""

    container: str
    name: str
    options: dict[str, str]
    container_options: dict[str, str]
    even: bool


_H264 = _Codec(
    container="mp4",
    name="libx264",
    # x264's macroblock tree reads memory that it never wrote if a row has not a multiple of 16 blocks: with it,
    # the same frames gave 2 to 6 different files in 25 tries
    options={"crf": "17", "preset": "medium", "mbtree": "0"},
    container_options={"movflags": "+faststart", "fflags": "+bitexact"},
    even=True,
)
_VP9 = _Codec(
    container="webm",
    name="libvpx-vp9",
    options={"crf": "18", "b": "0", "deadline": "good", "cpu-used": "3", "row-mt": "1"},
    container_options={"fflags": "+bitexact"},
    even=False,
)


class _Movie(_Encoder):
    def __init__(self, path: Path, job: _Job, codec: _Codec) -> None:
        super().__init__(path, job)
        self.pad = (job.height % 2, job.width % 2) if codec.even else (0, 0)
        self.container = av.open(
            str(path), "w", format=codec.container, container_options=codec.container_options
        )
        if job.comment:
            self.container.metadata["comment"] = job.comment
        stream: Any = self.container.add_stream(codec.name, rate=job.fps, options=codec.options)
        stream.width, stream.height = job.width + self.pad[1], job.height + self.pad[0]
        stream.pix_fmt = "yuv420p"
        context = stream.codec_context
        context.thread_count = ENCODER_THREADS
        context.colorspace = Colorspace.ITU709
        context.color_primaries = ColorPrimaries.BT709
        context.color_trc = ColorTrc.BT709
        context.color_range = ColorRange.MPEG
        self.stream = stream
        self.n = 0

    def write(self, frame: FramesHWC) -> None:
        if any(self.pad):
            frame = np.pad(frame, ((0, self.pad[0]), (0, self.pad[1]), (0, 0)), mode="edge")
        picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24").reformat(
            format="yuv420p",
            dst_colorspace=Colorspace.ITU709,
            dst_color_range=ColorRange.MPEG,
            interpolation=EXACT_COLOURS,
        )
        picture.pts, picture.time_base = self.n, 1 / self.job.fps
        self.n += 1
        self.container.mux(self.stream.encode(picture))

    def close(self) -> None:
        self.container.mux(self.stream.encode(None))
        self.container.close()

    def abort(self) -> None:
        self.container.close()


class _Gif(_Encoder):
    """One palette for the whole clip: it is computed while frames wait, uncompressed, in a temporary file."""

    def __init__(self, path: Path, job: _Job) -> None:
        super().__init__(path, job)
        self.spool = tempfile.TemporaryFile(dir=path.parent, prefix=".mutoscope-gif-")  # noqa: SIM115
        self.palette_graph = av.filter.Graph()
        source = self._source(self.palette_graph, "rgb24", job.width, job.height)
        # no transparent entry, all 256 colours for the picture
        palettegen = self.palette_graph.add("palettegen", "stats_mode=full:reserve_transparent=0")
        sink = self.palette_graph.add("buffersink")
        source.link_to(palettegen)
        palettegen.link_to(sink)
        self.palette_graph.configure()
        self.n = 0

    def _source(self, graph: Any, pixel_format: str, width: int, height: int) -> Any:
        return graph.add_buffer(width=width, height=height, format=pixel_format, time_base=1 / self.job.fps)

    def _frame(self, pixels: FramesHWC, index: int) -> Any:
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
        frame.pts, frame.time_base = index, 1 / self.job.fps
        return frame

    def write(self, frame: FramesHWC) -> None:
        self.spool.write(frame.tobytes())
        self.palette_graph.push(self._frame(frame, self.n))
        self.n += 1

    def close(self) -> None:
        self.palette_graph.push(None)
        palette: Any = self.palette_graph.pull()
        graph = av.filter.Graph()
        frames = self._source(graph, "rgb24", self.job.width, self.job.height)
        colours = self._source(graph, palette.format.name, palette.width, palette.height)
        # sierra2_4a keeps gradients smooth; "rectangle" dithers only what moves: still areas do not flicker
        paletteuse = graph.add("paletteuse", "dither=sierra2_4a:diff_mode=rectangle")
        sink = graph.add("buffersink")
        frames.link_to(paletteuse, 0, 0)
        colours.link_to(paletteuse, 0, 1)
        paletteuse.link_to(sink)
        graph.configure()
        colours.push(palette)
        colours.push(None)

        with av.open(
            str(self.path), "w", format="gif", container_options={"fflags": "+bitexact"}
        ) as container:
            stream: Any = container.add_stream("gif", rate=self.job.fps)
            stream.width, stream.height, stream.pix_fmt = self.job.width, self.job.height, "pal8"
            stream.codec_context.thread_count = 1
            self.spool.seek(0)
            shape = (self.job.height, self.job.width, 3)
            n_bytes = shape[0] * shape[1] * shape[2]
            for i in range(self.n):
                pixels = np.frombuffer(self.spool.read(n_bytes), np.uint8).reshape(shape)
                frames.push(self._frame(pixels, i))
                self._drain(graph, container, stream)
            frames.push(None)
            self._drain(graph, container, stream)
            container.mux(stream.encode(None))
        self.spool.close()
        if self.job.comment:
            _insert_gif_comment(self.path, self.job.comment)

    def _drain(self, graph: Any, container: Any, stream: Any) -> None:
        while True:
            try:
                frame = graph.pull()
            except (av.BlockingIOError, av.EOFError):
                return
            container.mux(stream.encode(frame))

    def abort(self) -> None:
        self.spool.close()


class _Still(_Encoder):
    """One picture."""

    def __init__(self, path: Path, job: _Job, pillow_format: str) -> None:
        super().__init__(path, job)
        self.format = pillow_format
        self.n = 0

    def write(self, frame: FramesHWC) -> None:
        if self.n:
            raise MediaError(
                "a second frame for a file that holds one picture.",
                hint='Write a video, or "name-%04d.png" for a sequence.',
            )
        self.n = 1
        _save_picture(self.path, frame, self.format, self.job.comment)

    def close(self) -> None: ...

    def abort(self) -> None: ...


class _Sequence(_Encoder):
    """A folder of PNG files, counted from 1. `path` is a folder."""

    def __init__(self, path: Path, job: _Job, pattern: str) -> None:
        super().__init__(path, job)
        path.mkdir()
        self.pattern = pattern
        self.n = 0

    def write(self, frame: FramesHWC) -> None:
        self.n += 1
        _save_picture(self.path / (self.pattern % self.n), frame, "PNG", self.job.comment)

    def close(self) -> None: ...

    def abort(self) -> None: ...


def _save_picture(path: Path, frame: FramesHWC, pillow_format: str, comment: str | None) -> None:
    image = Image.fromarray(frame)
    if pillow_format == "PNG":
        info = PngInfo()
        if comment:
            info.add_text("comment", comment)
        image.save(path, "PNG", pnginfo=info)
    elif pillow_format == "JPEG":
        image.save(path, "JPEG", quality=95, subsampling=0, comment=comment or "")
    else:
        exif = Image.Exif()
        if comment:
            exif[0x010E] = comment  # ImageDescription
        image.save(path, "WEBP", quality=95, method=4, exif=exif)


def _insert_gif_comment(path: Path, comment: str) -> None:
    """A comment extension right before the first image block (FFmpeg writes none)."""
    data = path.read_bytes()
    after_header = 13 + (3 << ((data[10] & 7) + 1) if data[10] & 0x80 else 0)
    text = comment.encode("ascii")
    blocks = b"".join(bytes([len(text[i : i + 255])]) + text[i : i + 255] for i in range(0, len(text), 255))
    path.write_bytes(data[:after_header] + b"\x21\xfe" + blocks + b"\x00" + data[after_header:])


# -- formats -------------------------------------------------------------------------------------------------

SEQUENCE = "png-sequence"
_ENCODERS: dict[str, Callable[[Path, _Job], _Encoder]] = {
    "mp4": lambda path, job: _Movie(path, job, _H264),
    "webm": lambda path, job: _Movie(path, job, _VP9),
    "gif": _Gif,
    "png": lambda path, job: _Still(path, job, "PNG"),
    "jpg": lambda path, job: _Still(path, job, "JPEG"),
    "jpeg": lambda path, job: _Still(path, job, "JPEG"),
    "webp": lambda path, job: _Still(path, job, "WEBP"),
}
FORMATS = (*_ENCODERS, SEQUENCE)
"""What `format` may be; each but the last is also a file name extension."""


def output_format(path: str | Path, format: str | None = None) -> str:
    """The format that `path` will be written in, after checking that it can be written at all.

    A folder, a name without extension or a "name-%04d.png" pattern means a PNG sequence. Call this before
    work that takes hours: it finds unknown extensions, missing folders and targets that must not be replaced.
    """
    path = Path(path)
    if format is None:
        extension = path.suffix.lower().lstrip(".")
        sequence = not extension or path.is_dir() or (extension == "png" and _PATTERN.search(path.name))
        format = SEQUENCE if sequence else extension
    if format not in FORMATS:
        raise MediaError(f"{path}: unknown format {format!r}.", hint=f"Expected: {', '.join(FORMATS)}.")
    if "%" in path.name and (
        format != SEQUENCE or path.suffix.lower() != ".png" or len(_PATTERN.findall(path.name)) != 1
    ):
        raise MediaError(f"{path}: is not a pattern for pictures.", hint='Expected: like "frame-%04d.png".')
    if not path.parent.is_dir():
        raise MediaError(f"{path}: the folder {path.parent} does not exist.", hint="Create it first.")
    if not os.access(path.parent, os.W_OK):
        raise MediaError(f"{path}: the folder {path.parent} is not writable.")
    if format == SEQUENCE:
        if path.is_file() or (path.is_dir() and any(path.iterdir())):
            raise MediaError(f"{path}: exists and is not an empty folder.", hint="Choose a new name.")
    elif path.is_dir():
        raise MediaError(f"{path}: is a folder, a file name expected.")
    return format


class VideoWriter:
    """Streams frames of one size into a file; see the module's text. Use it as a context manager.

    metadata  anything that JSON can say, by convention {request, model, seed, version}; see `read_metadata`
    format    one of FORMATS; None = by the extension
    """

    def __init__(
        self,
        path: str | Path,
        *,
        width: int,
        height: int,
        fps: float,
        metadata: Mapping[str, Any] | None = None,
        format: str | None = None,
    ) -> None:
        self.path = Path(path)
        self.format = output_format(self.path, format)
        self.width, self.height, self.frames = width, height, 0
        if width < 1 or height < 1 or width * height > MAX_PIXELS:
            raise MediaError(
                f"{self.path}: {width}x{height} pixels, from 1x1 to {MAX_PIXELS} pixels expected."
            )
        if not 0 < fps <= MAX_FPS:
            raise MediaError(f"{self.path}: {fps} frames per second, up to {MAX_FPS:g} expected.")
        is_pattern = "%" in self.path.name
        self._part = self.path.with_name(self.path.name.replace("%", "") + ".part")
        _remove(self._part)
        rate = Fraction(fps).limit_denominator(1001)  # 30000/1001 stays exact
        comment = comment_of(metadata) if metadata is not None else None
        job = _Job(width=width, height=height, fps=rate, comment=comment)
        with self._failures():
            if self.format == SEQUENCE:
                pattern = self.path.name if is_pattern else "frame-%04d.png"
                self._encoder: _Encoder = _Sequence(self._part, job, pattern)
            else:
                self._encoder = _ENCODERS[self.format](self._part, job)
        self._open = True

    def write(self, frame: FramesHWC) -> None:
        """Append one frame, uint8 [height, width, 3]."""
        if not self._open:
            raise MediaError(f"{self.path}: is already closed.")
        check_frames(frame, ndim=(3,), what=f"frame {self.frames} of {self.path.name}")
        if frame.shape != (self.height, self.width, 3):
            got = f"{frame.shape[1]}x{frame.shape[0]}"
            raise MediaError(
                f"{self.path}: frame {self.frames} is {got}, {self.width}x{self.height} expected."
            )
        with self._failures():
            self._encoder.write(frame)
        self.frames += 1

    def close(self) -> None:
        """Finish the file and move it to its place."""
        if not self._open:
            return
        if not self.frames:
            self.abort()
            raise MediaError(f"{self.path}: no frame was written.")
        self._open = False
        try:
            with self._failures():
                self._encoder.close()
                self._move()
        except BaseException:
            self._encoder.abort()
            _remove(self._part)
            raise

    def abort(self) -> None:
        """Throw the unfinished file away; the target stays as it was."""
        if self._open:
            self._open = False
            with suppress(av.FFmpegError, OSError):
                self._encoder.abort()
            _remove(self._part)

    def _move(self) -> None:
        if "%" in self.path.name:
            for picture in sorted(self._part.iterdir()):
                os.replace(picture, self.path.parent / picture.name)
            self._part.rmdir()
            return
        if self.format == SEQUENCE and self.path.is_dir():
            self.path.rmdir()  # empty: checked at the start
        os.replace(self._part, self.path)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    @contextmanager
    def _failures(self) -> Iterator[None]:
        """What the encoder raises, in our words."""
        try:
            yield
        except MutoscopeError as e:
            if str(self.path) in e.message:
                raise
            raise type(e)(f"{self.path}: {e.message}", hint=e.hint) from e
        except (av.FFmpegError, OSError, ValueError) as e:
            if getattr(e, "errno", None) in NO_ROOM:
                raise ResourceError(
                    f"{self.path}: the disk is full after {self.frames} frames.", hint="Free some space."
                ) from e
            raise MediaError(f"{self.path}: cannot be written ({e}).") from e


def write_image(path: str | Path, image: FramesHWC, *, metadata: Mapping[str, Any] | None = None) -> None:
    """Write one picture; the format follows the extension."""
    check_frames(image, ndim=(3,), what="picture")
    height, width = image.shape[:2]
    with VideoWriter(path, width=width, height=height, fps=1, metadata=metadata) as writer:
        writer.write(image)


def read_metadata(path: str | Path) -> dict[str, Any] | None:
    """The metadata that `VideoWriter` embedded, or None if the file has none of ours.

    Of a folder (PNG sequence) the first picture speaks.
    """
    path = Path(path)
    if path.is_dir():
        pictures = sorted(path.glob("*.png"))
        if not pictures:
            raise MediaError(f"{path}: holds no PNG files.")
        path = pictures[0]
    try:
        content = json.loads(probe(path).metadata.get("comment", ""))
    except ValueError:
        return None
    ours = content.get(METADATA_KEY) if isinstance(content, dict) else None
    return ours if isinstance(ours, dict) else None


def comment_of(metadata: Mapping[str, Any]) -> str:
    """What a container's comment says: see `METADATA_KEY`."""
    try:
        # ASCII: not every format's comment field knows UTF-8; sorted: equal content gives equal bytes
        return json.dumps({METADATA_KEY: dict(metadata)}, ensure_ascii=True, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as e:
        raise MediaError(f"metadata cannot be written as JSON: {e}.") from e


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
