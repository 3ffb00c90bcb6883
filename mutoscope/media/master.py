"""Formats for grading and for bright screens: HDR10 and HLG (HEVC), ProRes, EXR pictures. Frames in, file out.

    writer = MasterWriter("film.mp4", "hdr10", width=1920, height=1080, fps=24, hdr=True, info={...})
    writer.write(frame)         # uint8 [H, W, 3], BT.709
    writer.close()

HDR10 says in its headers: BT.2020, PQ, mastered for 1000 cd/m2 on BT.2020 primaries, brightest pixel at most that.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import numpy.typing as npt
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc

from mutoscope.errors import MediaError, ResourceError
from mutoscope.media import hdr as light
from mutoscope.media.read import EXACT_COLOURS
from mutoscope.media.write import NO_ROOM, comment_of
from mutoscope.request import FramesHWC

FORMATS = ("hdr10", "hlg", "prores", "exr_sequence")
EXTENSIONS = {"hdr10": "mp4", "hlg": "mp4", "prores": "mov", "exr_sequence": "zip"}
MIME = {
    "hdr10": "video/mp4",
    "hlg": "video/mp4",
    "prores": "video/quicktime",
    "exr_sequence": "application/zip",
}

THREADS = 4
_WHITE_16 = 255 << 8
"""libswscale takes this for the white of 16-bit RGB: with 65535 every level comes out 0.4 % too bright."""
_MASTERING = "G(8500,39850)B(6550,2300)R(35400,14600)WP(15635,16450)L(10000000,50)"
"""BT.2020 primaries and D65 in units of 0.00002, luminance in units of 0.0001 cd/m2 (SMPTE ST 2086)."""


class MasterWriter:
    """Streams frames of one size into `path`. Sizes in pixels (even for HDR10 and HLG), fps in frames per second.

    hdr  expand to high dynamic range (see hdr.py): always so for HDR10 and HLG, PQ in ProRes, linear light in EXR
    """

    def __init__(
        self,
        path: Path,
        format: str,
        *,
        width: int,
        height: int,
        fps: float,
        hdr: bool,
        info: Mapping[str, Any],
    ) -> None:
        self.path, self.format = path, format
        self.hdr = hdr or format in ("hdr10", "hlg")
        self.width, self.height = width, height
        self.rate = Fraction(fps).limit_denominator(1001)
        self.n = 0
        self.archive: zipfile.ZipFile | None = None
        self.container: Any = None
        with self._failures():
            if format == "exr_sequence":
                self.archive = zipfile.ZipFile(path, "w", zipfile.ZIP_STORED)
                self.archive.comment = comment_of(info).encode("ascii")[:65535]
            else:
                self._open(comment_of(info))

    def write(self, frame: FramesHWC) -> None:
        """Append one frame, uint8 [height, width, 3], BT.709."""
        with self._failures():
            if self.archive is not None:
                name = f"frame-{self.n + 1:04d}.exr"
                self.archive.writestr(zipfile.ZipInfo(name), exr_bytes(linear(frame, hdr=self.hdr)))
            else:
                picture = self._picture(frame)
                picture.pts, picture.time_base = self.n, 1 / self.rate
                self.container.mux(self.stream.encode(picture))
        self.n += 1

    def close(self) -> None:
        """Finish the file."""
        with self._failures():
            if self.archive is not None:
                self.archive.close()
            elif self.container is not None:
                self.container.mux(self.stream.encode(None))
                self.container.close()
        self.container = self.archive = None

    def abort(self) -> None:
        """Throw the unfinished file away; does nothing once closed."""
        unfinished: Any = self.container or self.archive
        if unfinished is None:
            return
        with suppress(av.FFmpegError, OSError):
            unfinished.close()
        self.container = self.archive = None
        self.path.unlink(missing_ok=True)

    def _open(self, comment: str) -> None:
        options = {"fflags": "+bitexact"}
        mp4 = self.format != "prores"
        self.container = av.open(
            str(self.path),
            "w",
            format="mp4" if mp4 else "mov",
            container_options={**options, "movflags": "+faststart"},
        )
        self.container.metadata["comment"] = comment
        codec, settings = (
            ("libx265", self._x265()) if mp4 else ("prores_ks", {"profile": "3", "vendor": "apl0"})
        )
        stream: Any = self.container.add_stream(codec, rate=self.rate, options=settings)
        stream.width, stream.height = self.width, self.height
        stream.pix_fmt = "yuv420p10le" if mp4 else "yuv422p10le"
        context = stream.codec_context
        context.thread_count = THREADS
        context.color_range = ColorRange.MPEG
        if self.hdr:
            context.colorspace, context.color_primaries = Colorspace.BT2020, ColorPrimaries.BT2020
            context.color_trc = ColorTrc.ARIB_STD_B67 if self.format == "hlg" else ColorTrc.SMPTE2084
        else:
            context.colorspace, context.color_primaries = Colorspace.ITU709, ColorPrimaries.BT709
            context.color_trc = ColorTrc.BT709
        if mp4:
            context.codec_tag = "hvc1"  # players of Apple know HEVC by this name only
        self.stream = stream

    def _x265(self) -> dict[str, str]:
        told = {
            "log-level": "error",
            "info": "0",
            "repeat-headers": "1",
            "colorprim": "bt2020",
            "colormatrix": "bt2020nc",
        }
        if self.format == "hlg":
            told["transfer"] = "arib-std-b67"
        else:
            told |= {"transfer": "smpte2084", "hdr10": "1", "master-display": _MASTERING,
                     "max-cll": f"{light.PEAK_NITS:.0f},0"}  # fmt: skip
        return {"crf": "18", "preset": "medium", "x265-params": ":".join(f"{k}={v}" for k, v in told.items())}

    def _picture(self, frame: FramesHWC) -> av.VideoFrame:
        if self.hdr:
            nits = light.to_hdr(frame)
            signal = light.hlg_from_display(nits) if self.format == "hlg" else light.pq_encode(nits)
            pixels: npt.NDArray[Any] = np.rint(signal * _WHITE_16).astype(np.uint16)
            source, space = "rgb48le", Colorspace.BT2020
        else:
            pixels, source, space = np.ascontiguousarray(frame), "rgb24", Colorspace.ITU709
        return av.VideoFrame.from_ndarray(pixels, format=source).reformat(
            format=self.stream.pix_fmt,
            dst_colorspace=space,
            dst_color_range=ColorRange.MPEG,
            interpolation=EXACT_COLOURS,
        )

    @contextmanager
    def _failures(self) -> Iterator[None]:
        try:
            yield
        except (av.FFmpegError, OSError, ValueError) as e:
            if getattr(e, "errno", None) in NO_ROOM:
                raise ResourceError(f"{self.path}: the disk is full after {self.n} frames.") from e
            raise MediaError(f"{self.path}: cannot be written ({e}).") from e


def linear(frame: FramesHWC, *, hdr: bool) -> npt.NDArray[np.float32]:
    """Linear light for EXR: with `hdr` BT.2020 where 1 is 203 cd/m2 (reference white), else BT.709 where 1 is white."""
    if hdr:
        return light.to_hdr(frame) / np.float32(light.REFERENCE_WHITE_NITS)
    return np.asarray((frame.astype(np.float32) / 255) ** light.SDR_GAMMA, np.float32)


def exr_bytes(pixels: npt.NDArray[np.float32]) -> bytes:
    """One picture, float32 [H, W, 3], as an OpenEXR file with half-float channels, compressed without loss."""
    height, width = pixels.shape[:2]
    frame = av.VideoFrame(width, height, "gbrpf32le")
    for plane, channel in zip(frame.planes, (1, 2, 0), strict=True):
        rows = np.frombuffer(memoryview(plane), np.float32).reshape(height, plane.line_size // 4)
        rows[:, :width] = pixels[..., channel]
    codec: Any = av.CodecContext.create("exr", "w")
    codec.width, codec.height, codec.pix_fmt, codec.time_base = width, height, "gbrpf32le", Fraction(1, 25)
    codec.options = {"compression": "zip16", "format": "half"}
    frame.pts = 0
    return b"".join(bytes(packet) for packet in (*codec.encode(frame), *codec.encode(None)))
