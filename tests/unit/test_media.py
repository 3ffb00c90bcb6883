"""Media: what is written can be read back, hostile and odd inputs are refused or handled, colours survive.

PSNR bounds are about 3 dB below what was measured when they were set (the measured value is beside each).
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image, ImageCms

from mutoscope.errors import MediaError, ResourceError
from mutoscope.media import read as read_module
from mutoscope.media.frames import (
    contact_sheet,
    cover_resize,
    letterbox_white,
    psnr,
    sample_indices,
    thumbnail,
    to_gray,
)
from mutoscope.media.read import iter_frames, probe, read_clip, read_image
from mutoscope.media.write import VideoWriter, output_format, read_metadata, write_image

METADATA = {"request": {"prompt": "a red ball, ein Ball, 球"}, "model": "pocket", "seed": 7, "version": "0.1"}


def clip(n: int = 17, height: int = 96, width: int = 128) -> np.ndarray:
    """A saturated red ball moving over a soft coloured gradient."""
    y, x = np.mgrid[:height, :width].astype(np.float64)
    ground = np.stack([x * 200 / width, y * 200 / height, np.full_like(x, 90)], -1)
    out = []
    for i in range(n):
        inside = np.clip(height / 4 - np.hypot(y - height / 2, x - 20 - i * (width - 40) / n), 0, 1)[
            ..., None
        ]
        out.append(np.rint(ground * (1 - inside) + np.array([230, 20, 40]) * inside))
    return np.stack(out).astype(np.uint8)


def write(path: Path, frames: np.ndarray, fps: float = 16, metadata: dict[str, Any] | None = None) -> Path:
    _, height, width, _ = frames.shape
    with VideoWriter(path, width=width, height=height, fps=fps, metadata=metadata) as writer:
        for frame in frames:
            writer.write(frame)
    return path


def numbered(n: int, size: int = 32) -> np.ndarray:
    """Frames that can be told apart after lossy coding: frame i is gray 10 + 12 * i."""
    return np.stack([np.full((size, size, 3), 10 + 12 * i, np.uint8) for i in range(n)])


def numbers(frames: np.ndarray) -> list[int]:
    return [round((float(f.mean()) - 10) / 12) for f in frames]


def write_raw_video(path: Path, frames: np.ndarray, pts_ms: list[int], **tags: Any) -> Path:
    """H.264 with given timestamps and whatever colour tags, as other programs write it."""
    with av.open(str(path), "w", format="matroska" if path.suffix == ".mkv" else "mp4") as container:
        stream: Any = container.add_stream("libx264", rate=tags.pop("rate", 30), options={"crf": "1"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        space = tags.pop("space", 1)
        if tags.pop("tagged", True):
            stream.codec_context.colorspace = space
        for pixels, ms in zip(frames, pts_ms, strict=True):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24").reformat(
                format="yuv420p", dst_colorspace=space, interpolation=read_module.EXACT_COLOURS
            )
            frame.pts, frame.time_base = ms, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


# -- writing and reading back --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "bound_db", "codec"),
    [
        ("a.mp4", 32, "h264"),  # measured 35.2
        ("a.webm", 34, "vp9"),  # measured 37.0
        ("a.gif", 31.5, "gif"),  # measured 34.6
        ("frames", 200, "png"),  # lossless: infinite
        ("a-%03d.png", 200, "png"),
    ],
)
def test_round_trip(tmp_path: Path, name: str, bound_db: float, codec: str) -> None:
    frames = clip()
    path = write(tmp_path / name, frames, metadata=METADATA)
    if codec == "png":
        pictures = sorted(path.iterdir()) if path.is_dir() else sorted(tmp_path.glob("a-*.png"))
        assert [p.name for p in pictures][:2] == (
            ["frame-0001.png", "frame-0002.png"] if path.is_dir() else ["a-001.png", "a-002.png"]
        )
        got = np.stack([read_image(p) for p in pictures])
        assert read_metadata(path if path.is_dir() else pictures[0]) == METADATA
    else:
        info = probe(path)
        assert (info.width, info.height, info.frames, info.codec) == (128, 96, 17, codec)
        assert info.fps == pytest.approx(16)
        assert info.duration_s == pytest.approx(17 / 16, abs=0.01)
        assert info.size_bytes == path.stat().st_size
        got_clip = read_clip(path, max_frames=100)
        got, fps = got_clip.frames, got_clip.fps
        assert fps == pytest.approx(16)
        assert read_metadata(path) == METADATA
    assert got.shape == frames.shape
    assert psnr(got, frames) > bound_db
    # no drift of brightness or hue: the mean of each channel stays
    assert np.abs(got.mean((0, 1, 2)) - frames.mean((0, 1, 2))).max() < 1.5  # measured: 0.6, 0.2, 0.7, 0
    assert list(tmp_path.glob("*.part")) == []


@pytest.mark.parametrize(
    ("name", "bound_db"), [("a.png", 200), ("a.jpg", 43), ("a.jpeg", 43), ("a.webp", 32)]
)
def test_pictures_round_trip(tmp_path: Path, name: str, bound_db: float) -> None:
    frame = clip(1)[0]
    write_image(tmp_path / name, frame, metadata=METADATA)
    assert psnr(read_image(tmp_path / name), frame) > bound_db  # measured: inf, 46.7, 46.7, 35.1
    assert read_metadata(tmp_path / name) == METADATA
    assert probe(tmp_path / name).kind == "image"


@pytest.mark.parametrize("name", ["a.mp4", "a.webm", "a.gif", "a.png", "a.jpg", "a.webp"])
def test_same_frames_give_same_bytes(tmp_path: Path, name: str) -> None:
    frames = clip(1 if Path(name).suffix in (".png", ".jpg", ".webp") else 17)
    files = []
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        files.append(write(tmp_path / folder / name, frames, metadata=METADATA).read_bytes())
    assert files[0] == files[1]
    other = write(tmp_path / name, 255 - frames, metadata=METADATA).read_bytes()
    assert other != files[0]


def test_saturated_colours_of_mp4_are_right_to_the_pixel(tmp_path: Path) -> None:
    """A wrong matrix (BT.601) or range moves these by 10 and more."""
    colours = [(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (255, 255, 255), (0, 0, 0), (19, 26, 60)]
    frames = np.concatenate([np.full((3, 64, 64, 3), c, np.uint8) for c in colours])
    for name in ("a.mp4", "a.webm"):
        got = read_clip(write(tmp_path / name, frames), max_frames=99).frames
        means = got[1::3].mean((1, 2))
        assert np.abs(means - np.array(colours)).max() <= 3  # measured 1


def test_writing_and_reading_do_not_darken(tmp_path: Path) -> None:
    """FFmpeg's default conversion loses 1 to 1.4 of 255 on average, which adds up over extended clips."""
    colours = np.random.default_rng(0).integers(0, 256, (8, 8, 3)).astype(np.uint8)
    frame = colours.repeat(32, 0).repeat(32, 1)
    got = read_clip(write(tmp_path / "a.mp4", np.stack([frame] * 3)), max_frames=1).frames[0]
    centres = (slice(16, None, 32), slice(16, None, 32))
    bias = (got[centres].astype(float) - frame[centres]).mean((0, 1))
    assert np.abs(bias).max() < 0.4  # measured 0.11


def test_video_files_are_tagged_and_start_fast(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4", clip(), metadata=METADATA)
    boxes, data, at = [], path.read_bytes(), 0
    while at < len(data):
        size, kind = struct.unpack(">I4s", data[at : at + 8])
        boxes.append(kind.decode())
        at += size
    assert boxes.index("moov") < boxes.index("mdat")
    for file in (path, write(tmp_path / "a.webm", clip())):
        with av.open(str(file)) as container:
            context: Any = container.streams.video[0].codec_context
            frame: Any = next(container.decode(video=0))
            assert context.pix_fmt == "yuv420p"
            assert (frame.colorspace, frame.color_range) == (1, 1)  # BT.709, limited
            assert (context.color_primaries, context.color_trc) == (1, 1)


def test_gif_keeps_many_colours_and_loops(tmp_path: Path) -> None:
    hues = np.stack(
        [np.asarray(Image.new("HSV", (32, 32), (h, 255, 255)).convert("RGB")) for h in range(0, 240, 20)]
    )
    path = write(tmp_path / "a.gif", hues)
    got = read_clip(path, max_frames=99).frames
    assert np.abs(got.astype(int) - hues).max() <= 3  # measured 0
    with Image.open(path) as image:
        assert image.info["loop"] == 0


@pytest.mark.parametrize(
    ("name", "size"), [("a.mp4", (34, 48)), ("a.webm", (33, 47)), ("a.gif", (33, 47)), ("seq", (33, 47))]
)
def test_odd_sizes(tmp_path: Path, name: str, size: tuple[int, int]) -> None:
    frames = clip(5, height=47, width=33)
    path = write(tmp_path / name, frames)
    got = (
        np.stack([read_image(p) for p in sorted(path.iterdir())])
        if path.is_dir()
        else read_clip(path, max_frames=9).frames
    )
    assert got.shape[1:3] == size[::-1]
    assert psnr(got[:, :47, :33], frames) > 26  # measured 29.3 (mp4) and more


def test_fractional_rate_is_exact(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4", clip(5), fps=30000 / 1001)
    with av.open(str(path)) as container:
        assert container.streams.video[0].average_rate == Fraction(30000, 1001)


def test_failure_leaves_the_old_file(tmp_path: Path) -> None:
    for name in ("a.mp4", "a.gif", "a.png"):
        path = tmp_path / name
        path.write_bytes(b"old")
        with pytest.raises(RuntimeError), VideoWriter(path, width=32, height=32, fps=8) as writer:  # noqa: PT012
            writer.write(numbered(1)[0])
            raise RuntimeError
        assert path.read_bytes() == b"old"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.gif", "a.mp4", "a.png"]
    with pytest.raises(RuntimeError), VideoWriter(tmp_path / "seq", width=32, height=32, fps=8) as writer:  # noqa: PT012
        writer.write(numbered(1)[0])
        raise RuntimeError
    assert not (tmp_path / "seq").exists()
    assert not (tmp_path / "seq.part").exists()


def test_a_full_disk_is_a_resource_error(tmp_path: Path) -> None:
    writer = VideoWriter(tmp_path / "seq", width=32, height=32, fps=8)
    with pytest.raises(ResourceError, match=r"disk is full after 0 frames"), writer._failures():
        raise OSError(errno.ENOSPC, "No space left on device")
    writer.abort()


def test_writer_refuses(tmp_path: Path) -> None:
    frame = numbered(1)[0]

    def message(path: str | Path, **changes: Any) -> str:
        arguments: dict[str, Any] = {"width": 32, "height": 32, "fps": 8, **changes}
        with pytest.raises(MediaError) as caught:
            VideoWriter(tmp_path / path, **arguments).close()
        return str(caught.value)

    assert "unknown format 'avi'. Expected: mp4, webm, gif" in message("a.avi")
    assert "folder" in message("no/such/a.mp4")
    assert "does not exist" in message("no/such/a.mp4")
    assert "no frame was written" in message("a.mp4")
    assert "pattern" in message("a-%d.mp4")
    assert "pattern" in message("a-%d-%d.png")
    assert "pattern" in message("a-%s.png", format="png-sequence")
    assert "0x32" in message("a.mp4", width=0)
    assert "-1 frames per second" in message("a.mp4", fps=-1)
    assert "metadata cannot be written as JSON" in message("a.mp4", metadata={"x": object()})
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    assert "not an empty folder" in message("full")
    (tmp_path / "dir.mp4").mkdir()
    assert "is a folder" in message("dir.mp4", format="mp4")
    assert not list(tmp_path.glob("*.part"))

    with VideoWriter(tmp_path / "b.mp4", width=32, height=32, fps=8) as writer:
        with pytest.raises(MediaError, match=r"frame 0 is 16x32, 32x32 expected"):
            writer.write(frame[:, :16])
        with pytest.raises(MediaError, match=r"got float32 \[32, 32, 3\].*Multiply by 255"):
            writer.write(frame.astype(np.float32))
        writer.write(frame)
    with pytest.raises(MediaError, match="already closed"):
        writer.write(frame)
    with pytest.raises(MediaError, match=r"a\.png: a second frame.*name-%04d"):
        write(tmp_path / "a.png", numbered(2))


def test_output_format(tmp_path: Path) -> None:
    assert output_format(tmp_path / "x.MP4") == "mp4"
    assert output_format(tmp_path / "x.png") == "png"
    assert output_format(tmp_path / "x-%04d.png") == "png-sequence"
    assert output_format(tmp_path / "frames") == "png-sequence"
    assert output_format(tmp_path / "odd.name", "webm") == "webm"


def test_foreign_comments_are_not_our_metadata(tmp_path: Path) -> None:
    for i, comment in enumerate(("hello", "[1]", '{"other": 1}', '{"mutoscope": 3}')):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{i}.jpg", comment=comment)
        assert read_metadata(tmp_path / f"{i}.jpg") is None
    assert read_metadata(write(tmp_path / "a.mp4", numbered(3))) is None


# -- reading what others wrote -------------------------------------------------------------------------------


def test_file_names_are_not_trusted(tmp_path: Path) -> None:
    video = write(tmp_path / "a.mp4", clip(5)).rename(tmp_path / "picture.png")
    assert probe(video).kind == "video"
    with pytest.raises(MediaError, match="is a video, a picture expected"):
        read_image(video)
    Image.new("RGB", (8, 8), "red").save(tmp_path / "b.png")
    still = (tmp_path / "b.png").rename(tmp_path / "b.mp4")
    assert probe(still).kind == "image"
    assert read_clip(still, max_frames=9).frames.shape == (1, 8, 8, 3)
    assert read_clip(still, max_frames=9).fps is None


def make_audio(path: Path) -> None:
    with av.open(str(path), "w", format="mp4") as container:
        stream: Any = container.add_stream("aac", rate=44100, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 44100
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def broken_files(folder: Path) -> Iterator[tuple[str, str]]:
    """(file, what the error must say)"""
    yield "missing.mp4", "no such file"
    (folder / "dir").mkdir()
    yield "dir", "is a folder"
    (folder / "empty.mp4").touch()
    yield "empty.mp4", "is empty"
    (folder / "text.mp4").write_text("hello " * 200)
    yield "text.mp4", "neither a picture nor a video"
    (folder / "list.mp4").write_text("#EXTM3U\n#EXTINF:10,\nhttp://127.0.0.1/secret\n")
    yield "list.mp4", "neither a picture nor a video"
    (folder / "concat.mp4").write_text("ffconcat version 1.0\nfile /etc/hostname\n")
    yield "concat.mp4", "neither a picture nor a video"
    (folder / "image.svg").write_text('<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>')
    yield "image.svg", "neither a picture nor a video"
    make_audio(folder / "audio.mp4")
    yield "audio.mp4", r"no video stream \(found: audio\)"
    whole = write(folder / "whole.mp4", clip(33)).read_bytes()
    (folder / "half.mp4").write_bytes(whole[: len(whole) // 2])
    yield "half.mp4", "cut short|cannot be decoded"
    (folder / "head.mp4").write_bytes(whole[:200])
    yield "head.mp4", "no video stream"
    webm = write(folder / "whole.webm", clip(33)).read_bytes()
    (folder / "half.webm").write_bytes(webm[: len(webm) // 2])
    yield "half.webm", "cut short|cannot be decoded"
    png = folder / "whole.png"
    write_image(png, clip(1)[0])
    (folder / "half.png").write_bytes(png.read_bytes()[:300])
    yield "half.png", "cannot be decoded"
    (folder / "noise.jpg").write_bytes(b"\xff\xd8\xff\xe0" + bytes(range(256)) * 4)
    yield "noise.jpg", "neither|cannot be"


def test_broken_files_give_one_clear_error(tmp_path: Path) -> None:
    cases = list(broken_files(tmp_path))
    assert len(cases) == 13
    for name, expected in cases:
        with pytest.raises(MediaError, match=expected) as caught:
            read_clip(tmp_path / name, max_frames=100)
        assert name in str(caught.value)
    for name, _ in cases[:8]:
        with pytest.raises(MediaError):
            probe(tmp_path / name)
        with pytest.raises(MediaError):
            read_image(tmp_path / name)


def test_decompression_bombs_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "bomb.png"
    Image.new("1", (20000, 20000)).save(path)
    assert path.stat().st_size < 100_000
    with pytest.raises(MediaError, match="million pixels"):
        read_image(path)
    Image.new("1", (9000, 9000)).save(path)
    with pytest.raises(MediaError, match=r"9000x9000 are 81 million pixels, at most 64 million"):
        probe(path)
    monkeypatch.setattr(read_module, "MAX_PIXELS", 1000)
    with pytest.raises(MediaError, match="million pixels"):
        read_clip(write(tmp_path / "a.mkv.mp4", numbered(2)), max_frames=1)


def test_picture_modes(tmp_path: Path) -> None:
    path = tmp_path / "a.png"

    Image.fromarray(np.array([[0, 32768, 65535, 257]], np.uint16)).save(path)
    assert read_image(path)[0, :, 0].tolist() == [0, 128, 255, 1]

    Image.new("L", (2, 2), 77).save(path)
    assert read_image(path).tolist() == [[[77] * 3] * 2] * 2

    Image.new("1", (2, 2), 1).save(path)
    assert read_image(path).max() == 255

    Image.new("RGB", (4, 4), (10, 200, 30)).quantize(4).save(path)
    assert read_image(path)[0, 0].tolist() == [10, 200, 30]

    Image.new("RGBA", (2, 2), (255, 0, 0, 0)).save(path)
    assert read_image(path)[0, 0].tolist() == [255, 255, 255]
    Image.new("RGBA", (2, 2), (255, 0, 0, 128)).save(path)
    assert np.abs(read_image(path)[0, 0].astype(int) - [255, 127, 127]).max() <= 1

    Image.new("LA", (2, 2), (0, 0)).save(path)
    assert read_image(path)[0, 0].tolist() == [255, 255, 255]

    palette = Image.new("P", (2, 2), 0)
    palette.putpalette([9, 9, 9])
    palette.save(path, transparency=0)
    assert read_image(path)[0, 0].tolist() == [255, 255, 255]

    Image.new("CMYK", (2, 2), (0, 0, 0, 0)).save(tmp_path / "c.jpg")
    assert read_image(tmp_path / "c.jpg")[0, 0].tolist() == [255, 255, 255]

    Image.fromarray(np.ones((2, 2), np.float32)).save(tmp_path / "f.tiff")
    with pytest.raises(MediaError, match="floating-point"):
        read_image(tmp_path / "f.tiff")


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    pixels = np.zeros((8, 16, 3), np.uint8)
    pixels[:, 8:] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise: left becomes top
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    got = read_image(tmp_path / "a.png")
    assert got.shape == (16, 8, 3)
    assert got[:8].max() == 0
    assert got[8:].min() == 255
    assert (probe(tmp_path / "a.png").width, probe(tmp_path / "a.png").height) == (8, 16)


def test_colour_profile_is_honoured_and_a_broken_one_ignored(tmp_path: Path) -> None:
    red = Image.new("RGB", (4, 4), (200, 30, 30))
    lab_free = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    red.save(tmp_path / "srgb.png", icc_profile=lab_free)
    assert np.abs(read_image(tmp_path / "srgb.png")[0, 0].astype(int) - [200, 30, 30]).max() <= 1
    red.save(tmp_path / "broken.png", icc_profile=b"no profile")
    assert read_image(tmp_path / "broken.png")[0, 0].tolist() == [200, 30, 30]


def test_rotation_of_phone_clips(tmp_path: Path) -> None:
    frames = np.zeros((4, 32, 64, 3), np.uint8)
    frames[:, :, 32:] = 255  # the right half is white
    data = bytearray(write(tmp_path / "a.mp4", frames).read_bytes())
    matrix = data.index(b"tkhd") + 4 + 40  # version and flags, times, ids, layer, volume come first
    assert data[matrix : matrix + 4] == struct.pack(">i", 1 << 16)
    clockwise = (0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)
    data[matrix : matrix + 36] = struct.pack(">9i", *clockwise)
    (tmp_path / "b.mp4").write_bytes(data)
    info, got = probe(tmp_path / "b.mp4"), read_clip(tmp_path / "b.mp4", max_frames=9).frames
    assert (info.width, info.height) == (32, 64)
    assert got.shape == (4, 64, 32, 3)
    assert got[:, 40:].min() > 200  # turned clockwise, right is below
    assert got[:, :24].max() < 50


@pytest.mark.parametrize(("height", "space"), [(64, 5), (720, 1)])
def test_untagged_clips_use_the_matrix_of_their_size(tmp_path: Path, height: int, space: int) -> None:
    frames = np.full((2, height, 64, 3), (200, 40, 40), np.uint8)
    path = write_raw_video(tmp_path / "a.mkv", frames, [0, 40], space=space, tagged=False)
    assert np.abs(read_clip(path, max_frames=2).frames.mean((0, 1, 2)) - [200, 40, 40]).max() < 4


def test_variable_frame_rate_keeps_the_duration(tmp_path: Path) -> None:
    # 10 frames a second, but frame 4 stays for a whole second, as screen recorders do
    pts = [0, 100, 200, 300, 400, 1400, 1500, 1600]
    path = write_raw_video(tmp_path / "a.mkv", numbered(8), pts, rate=10)
    got = read_clip(path, max_frames=100)
    assert got.fps == pytest.approx(10)
    assert numbers(got.frames) == [0, 1, 2, 3] + [4] * 10 + [5, 6, 7]


def test_frames_can_be_thinned_repeated_and_picked(tmp_path: Path) -> None:
    path = write(tmp_path / "a.webm", numbered(16), fps=60)  # WebM rounds times to milliseconds
    assert numbers(read_clip(path, max_frames=99).frames) == list(range(16))
    thinned = numbers(read_clip(path, max_frames=99, fps=30).frames)
    assert len(thinned) == 8
    assert set(np.diff(thinned)) == {2}
    assert numbers(read_clip(path, max_frames=4, fps=120).frames) == [0, 0, 1, 1]
    assert numbers(read_clip(path, max_frames=3).frames) == [0, 1, 2]
    assert numbers(read_clip(path, max_frames=3, pick="last").frames) == [13, 14, 15]
    assert numbers(read_clip(path, max_frames=4, pick="spread").frames) == [0, 5, 10, 15]
    assert numbers(read_clip(path, max_frames=99, pick="spread").frames) == list(range(16))
    assert read_clip(path, max_frames=2, size=(16, 8)).frames.shape == (2, 8, 16, 3)
    assert sum(1 for _ in iter_frames(path)) == 16
    with pytest.raises(MediaError, match="fps=0"):
        read_clip(path, max_frames=2, fps=0)
    with pytest.raises(MediaError, match="max_frames=0"):
        read_clip(path, max_frames=0)


def test_arrays_pass_through() -> None:
    frames = numbered(9)
    assert read_clip(frames, max_frames=4).fps is None
    assert numbers(read_clip(frames, max_frames=4).frames) == [0, 1, 2, 3]
    assert numbers(read_clip(frames, max_frames=2, pick="last").frames) == [7, 8]
    assert numbers(read_clip(frames, max_frames=3, pick="spread").frames) == [0, 4, 8]
    assert read_image(frames[0]) is not None
    for bad in (frames[0].astype(np.float32), frames[0][..., :1], frames[:0], [1, 2]):
        with pytest.raises(MediaError, match=r"expected|empty"):
            read_image(bad)  # type: ignore[arg-type]


def test_animations(tmp_path: Path) -> None:
    pictures = [Image.fromarray(f) for f in numbered(4)]
    for name, options in (("a.gif", {}), ("a.png", {}), ("a.webp", {"lossless": True})):
        path = tmp_path / name
        pictures[0].save(
            path, save_all=True, append_images=pictures[1:], duration=[100, 100, 300, 100], **options
        )
        info = probe(path)
        assert (info.kind, info.frames, info.fps) == ("animation", 4, 10)
        assert info.duration_s == pytest.approx(0.6)
        assert numbers(read_clip(path, max_frames=99).frames) == [0, 1, 2, 2, 2, 3]
        assert numbers(read_image(path)[None]) == [0]


def test_a_clip_with_absurd_timestamps_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_raw_video(tmp_path / "a.mkv", numbered(4), [0, 33, 66, 3_000_000], rate=30)
    assert len(read_clip(path, max_frames=10).frames) == 10
    monkeypatch.setattr(read_module, "MAX_CLIP_FRAMES", 500)
    with pytest.raises(MediaError, match="timestamps span more than 500 frames"):
        read_clip(path, max_frames=5, pick="last")


# -- frames --------------------------------------------------------------------------------------------------


def test_cover_resize_crops_the_middle() -> None:
    image = np.zeros((40, 80, 3), np.uint8)
    image[:, 20:60] = 200
    assert cover_resize(image, 16, 16)[:, 2:-2].min() == 200  # the outer quarters are cropped away
    assert cover_resize(np.stack([image] * 3), 40, 20).shape == (3, 20, 40, 3)
    assert cover_resize(image, 80, 40) is image
    assert np.abs(cover_resize(image, 160, 80)[:, 60:100].astype(int) - 200).max() == 0


def test_letterbox_white_centres() -> None:
    got = letterbox_white(np.zeros((10, 20, 3), np.uint8), 64, 64)
    assert got.shape == (64, 64, 3)
    assert (got[:16] == 255).all()
    assert (got[48:] == 255).all()
    assert (got[16:48] == 0).all()
    assert (letterbox_white(np.zeros((30, 10, 3), np.uint8), 30, 60)[:, 5:25] == 0).all()


def test_to_gray_uses_luma() -> None:
    got = to_gray(np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255]]], np.uint8))
    assert got[0].tolist() == [[76] * 3, [150] * 3, [29] * 3]


def test_sample_indices() -> None:
    assert sample_indices(9, 5) == [0, 2, 4, 6, 8]
    assert sample_indices(3, 5) == [0, 0, 1, 2, 2]
    assert sample_indices(100, 1) == [0]
    with pytest.raises(MediaError):
        sample_indices(0, 5)


def test_contact_sheet_and_thumbnail() -> None:
    sheet = contact_sheet(numbered(5, size=8), 3)
    assert sheet.shape == (18, 28, 3)
    assert sheet[0, 0, 0] == 10
    assert sheet[10, 10, 0] == 10 + 12 * 4
    assert (sheet[8:10] == 255).all()
    assert (sheet[10:, 20:] == 255).all()
    assert contact_sheet(numbered(2, size=8), 9).shape == (8, 18, 3)
    assert thumbnail(np.zeros((100, 50, 3), np.uint8), 20).shape == (20, 10, 3)
    assert thumbnail(np.zeros((10, 5, 3), np.uint8), 20).shape == (10, 5, 3)


def test_psnr() -> None:
    a = np.zeros((4, 4, 3), np.uint8)
    assert psnr(a, a) == float("inf")
    assert psnr(a, a + 1) == pytest.approx(48.13, abs=0.01)
    with pytest.raises(MediaError):
        psnr(a, a[:2])
