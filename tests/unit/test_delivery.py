"""Files of jobs: sizes, formats, high dynamic range and frame rates, checked by decoding what was written."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from mutoscope.errors import MediaError, RequestError
from mutoscope.media import hdr, master
from mutoscope.media.deliver import MIME, Delivery
from mutoscope.media.frames import psnr
from mutoscope.media.operations import frames_of, plan_operation
from mutoscope.media.rate import change_rate, frames_after
from mutoscope.media.read import probe, read_clip, read_image
from mutoscope.media.scale import cover_lanczos
from mutoscope.media.write import VideoWriter, read_metadata

Frames = npt.NDArray[np.uint8]


def disc(x: float, y: float = 48.0, width: int = 160, height: int = 96, radius: float = 20.0) -> Frames:
    """A white disc with a soft edge, on black."""
    rows, columns = np.mgrid[:height, :width]
    gray = 255 * np.clip(radius - np.hypot(columns - x, rows - y), 0, 1)
    return np.repeat(gray.astype(np.uint8)[..., None], 3, axis=-1)


def centre(frame: Frames) -> float:
    weights = frame[..., 0].astype(float)
    return float((weights * np.arange(frame.shape[1])).sum() / weights.sum())


def moving(n: int = 9, step: float = 6.0) -> list[Frames]:
    return [disc(40 + step * i) for i in range(n)]


# -- Lanczos -------------------------------------------------------------------------------------------------


def test_lanczos_keeps_what_is_there_already() -> None:
    frame = disc(60)
    assert cover_lanczos(frame, 160, 96) is frame


def test_lanczos_enlarges_without_moving() -> None:
    small = disc(60, 40, 120, 80)
    large = cover_lanczos(small, 240, 160)
    assert large.shape == (160, 240, 3)
    ideal = disc(60 * 2 + 0.5, 40 * 2 + 0.5, 240, 160, 40)
    nearest = np.asarray(Image.fromarray(small).resize((240, 160), Image.Resampling.NEAREST))
    assert psnr(large, ideal) > psnr(nearest, ideal) + 1


def test_another_aspect_ratio_is_cropped_at_the_middle() -> None:
    wide = cover_lanczos(disc(80), 96, 96)
    assert wide.shape == (96, 96, 3)
    assert centre(wide) == pytest.approx(48, abs=0.6)


# -- frame rates ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("fps", "wanted"), [(8, 16), (8, 24), (24, 60), (23.976, 60)])
def test_frames_in_between_lie_in_between(fps: float, wanted: float) -> None:
    frames = list(change_rate(iter(moving()), fps, wanted))
    assert len(frames) == frames_after(9, fps, wanted) == math.ceil(9 * wanted / fps - 1e-6)
    for i, frame in enumerate(frames):
        expected = 40 + 6 * min(8.0, i * fps / wanted)
        assert centre(frame) == pytest.approx(expected, abs=1.0), i


def test_a_lower_rate_leaves_frames_out() -> None:
    frames = list(change_rate(iter(moving()), 24, 8))
    assert [round(centre(f)) for f in frames] == [40, 58, 76]
    assert [round(centre(f)) for f in change_rate(iter(moving(4)), 24, 24)] == [40, 46, 52, 58]


def test_rates_and_clips_that_are_none() -> None:
    with pytest.raises(MediaError, match="up to 240"):
        list(change_rate(iter(moving()), 24, 300))
    with pytest.raises(MediaError, match="without frames"):
        list(change_rate(iter(()), 8, 16))


def test_very_small_clips_are_blended() -> None:
    small = [np.full((8, 8, 3), v, np.uint8) for v in (60, 80, 100)]
    frames = list(change_rate(iter(small), 8, 16))
    assert len(frames) == 6
    assert [int(f.mean()) for f in frames] == pytest.approx([60, 70, 80, 90, 100, 100], abs=3)


def test_a_cut_is_not_blended() -> None:
    shots = [np.zeros((48, 64, 3), np.uint8)] * 4 + [np.full((48, 64, 3), 255, np.uint8)] * 4
    levels = [int(f.mean()) for f in change_rate(iter(shots), 8, 16)]
    assert set(levels) == {0, 255}


# -- high dynamic range --------------------------------------------------------------------------------------


def test_pq_agrees_with_the_published_levels() -> None:
    """10-bit codes of BT.2408 table 1 and ST 2084: 0, 100, 203, 1000, 4000 and 10000 cd/m2."""
    nits = [0, 100, 203, 1000, 4000, 10000]
    assert hdr.pq_encode(nits) == pytest.approx([0, 0.508078, 0.580689, 0.751827, 0.902572, 1], abs=2e-5)
    levels = np.geomspace(0.01, 10000, 60)
    assert hdr.pq_decode(hdr.pq_encode(levels)) == pytest.approx(levels, rel=2e-3)


def test_hlg_agrees_with_the_published_levels() -> None:
    """BT.2100 table 5: one half at a twelfth of the scene's light; 75 % is the level of reference white."""
    assert hdr.hlg_encode([0, 1 / 12, 1]) == pytest.approx([0, 0.5, 1], abs=1e-5)
    white = np.full((1, 1, 3), 203.0, np.float32)
    assert hdr.hlg_from_display(white)[0, 0] == pytest.approx([0.75] * 3, abs=2e-3)


def test_expansion_follows_method_a() -> None:
    """BT.2446-1: both branches meet at 70, white becomes 1000 cd/m2, and the curve rises everywhere."""
    assert hdr.expand_luma([1.0])[0] == pytest.approx(1.0, abs=1e-3)
    below, above = hdr.expand_luma([70 / 255, 70.001 / 255])
    assert below == pytest.approx(above, rel=1e-3)
    curve = hdr.expand_luma(np.linspace(0, 1, 256))
    assert (np.diff(curve) > 0).all()
    assert hdr.expand_luma([128 / 255])[0] == pytest.approx((128**1.20365) / 1000, rel=1e-3)


def test_gray_stays_gray_and_hues_stay_where_they_are() -> None:
    gray = hdr.to_hdr(np.full((2, 2, 3), 180, np.uint8))
    assert np.ptp(gray[0, 0]) < 0.01 * gray.max()
    red = hdr.to_hdr(np.full((2, 2, 3), (200, 30, 30), np.uint8))[0, 0]
    assert red[0] > 4 * red[1]
    assert red[1] > red[2]  # the red of BT.709 is a little orange among the primaries of BT.2020
    assert (hdr.to_hdr(np.zeros((2, 2, 3), np.uint8)) == 0).all()


def decoded(path: Path) -> Iterator[Any]:
    with av.open(str(path)) as container:
        yield from container.decode(video=0)


def codes(frame: Any) -> list[int]:
    """Y', Cb and Cr of the first pixel, 10 bits."""
    return [int(np.frombuffer(memoryview(plane), np.uint16)[0]) for plane in frame.planes]


def master_file(folder: Path, format: str, *, hdr: bool = True, gray: int = 255) -> Path:
    path = folder / f"clip.{master.EXTENSIONS[format]}"
    writer = master.MasterWriter(path, format, width=64, height=48, fps=24, hdr=hdr, info={"seed": 3})
    for _ in range(3):
        writer.write(np.full((48, 64, 3), gray, np.uint8))
    writer.close()
    return path


def test_hdr10_says_what_it_is_and_holds_the_right_levels(tmp_path: Path) -> None:
    path = master_file(tmp_path, "hdr10")
    frames = list(decoded(path))
    assert len(frames) == 3
    assert frames[0].format.name == "yuv420p10le"
    assert codes(frames[0]) == pytest.approx([64 + 876 * 0.7518, 512, 512], abs=1.5)  # 1000 cd/m2
    kinds = {data.type.name for data in frames[0].side_data}
    assert {"MASTERING_DISPLAY_METADATA", "CONTENT_LIGHT_LEVEL"} <= kinds
    with av.open(str(path)) as container:
        context = container.streams.video[0].codec_context
        told = (context.color_primaries, context.color_trc, context.colorspace, context.color_range)
        assert told == (9, 16, 9, 1)
        assert container.streams.video[0].codec_context.codec_tag == "hvc1"
    assert read_metadata(path) == {"seed": 3}


def test_hlg(tmp_path: Path) -> None:
    path = master_file(tmp_path, "hlg")
    assert codes(next(decoded(path))) == pytest.approx([940, 512, 512], abs=1.5)
    with av.open(str(path)) as container:
        assert container.streams.video[0].codec_context.color_trc == 18


@pytest.mark.parametrize(("expand", "level", "curve"), [(False, 940, 1), (True, 64 + 876 * 0.7518, 16)])
def test_prores(tmp_path: Path, expand: bool, level: float, curve: int) -> None:
    path = master_file(tmp_path, "prores", hdr=expand)
    frame = next(decoded(path))
    assert frame.format.name == "yuv422p10le"
    assert codes(frame) == pytest.approx([level, 512, 512], abs=2)
    with av.open(str(path)) as container:
        assert container.streams.video[0].codec_context.color_trc == curve


@pytest.mark.parametrize(("expand", "value"), [(False, (128 / 255) ** 2.4), (True, 76.2 / 203)])
def test_exr_holds_linear_light(tmp_path: Path, expand: bool, value: float) -> None:
    path = master_file(tmp_path, "exr_sequence", hdr=expand, gray=128)
    with zipfile.ZipFile(path) as archive:
        assert archive.namelist() == ["frame-0001.exr", "frame-0002.exr", "frame-0003.exr"]
        archive.extract("frame-0002.exr", tmp_path)
    frame = next(decoded(tmp_path / "frame-0002.exr"))
    assert (frame.width, frame.height) == (64, 48)
    for plane in frame.planes:
        assert np.frombuffer(memoryview(plane), np.float16)[:64] == pytest.approx(value, rel=0.02)


def test_exr_channels_are_in_order() -> None:
    pixels = np.zeros((5, 7, 3), np.float32)
    pixels[2, 3] = (0.25, 0.5, 2.0)
    container = av.open(__import__("io").BytesIO(master.exr_bytes(pixels)), format="exr_pipe")
    with container:
        frame = next(container.decode(video=0))
    got = [
        np.frombuffer(memoryview(p), np.float16).reshape(5, -1)[2, 3]
        for p in (frame.planes[i] for i in (2, 0, 1))
    ]
    assert got == [0.25, 0.5, 2.0]


def test_an_unfinished_master_leaves_nothing(tmp_path: Path) -> None:
    for format in master.FORMATS:
        path = tmp_path / f"x.{master.EXTENSIONS[format]}"
        writer = master.MasterWriter(path, format, width=64, height=48, fps=24, hdr=True, info={})
        writer.write(np.zeros((48, 64, 3), np.uint8))
        writer.abort()
        writer.abort()
        assert not path.exists()


# -- deliveries ----------------------------------------------------------------------------------------------


def deliver(folder: Path, format: str, frames: list[Frames], **options: Any) -> Any:
    given = {"width": 96, "height": 64, "fps": 8.0, "info": {"seed": 1}, **options}
    delivery = Delivery(folder, format=format, frames=len(frames), **given)
    for frame in frames:
        delivery.write(frame[None])
    return delivery.close()


def test_a_video_comes_with_a_thumbnail_and_a_sheet(tmp_path: Path) -> None:
    made = deliver(tmp_path, "mp4", moving(17))
    assert [(m.role, m.name, m.mime) for m in made] == [
        ("video", "video.mp4", "video/mp4"),
        ("thumbnail", "thumbnail.webp", "image/webp"),
        ("spritesheet", "spritesheet.jpg", "image/jpeg"),
    ]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(m.name for m in made)
    info = probe(tmp_path / "video.mp4")
    assert (info.width, info.height, info.frames, info.fps) == (96, 64, 17, 8.0)
    assert (made[0].width, made[0].height, made[0].frames, made[0].fps) == (96, 64, 17, 8.0)
    for small in made[1:]:
        picture = read_image(tmp_path / small.name)
        assert picture.shape == (small.height, small.width, 3)
    assert read_metadata(tmp_path / "video.mp4") == {"seed": 1}


@pytest.mark.parametrize("format", sorted(MIME))
def test_every_format_can_be_written(tmp_path: Path, format: str) -> None:
    frames = moving(1 if format in ("png", "jpeg", "webp") else 3)
    made = deliver(tmp_path, format, frames)
    main = tmp_path / made[0].name
    assert main.stat().st_size > 100
    if made[0].mime == "application/zip":
        with zipfile.ZipFile(main) as archive:
            assert len(archive.namelist()) == 3
    else:
        assert probe(main).frames == len(frames)
    assert not list(tmp_path.glob("*.part")) + list(tmp_path.glob("frames"))


def test_hdr_of_an_mp4_is_hdr10_and_of_a_gif_is_refused(tmp_path: Path) -> None:
    made = deliver(tmp_path, "mp4", moving(2), hdr=True)
    assert probe(tmp_path / made[0].name).codec == "hevc"
    with pytest.raises(RequestError, match="HDR cannot be written as gif"):
        deliver(tmp_path, "gif", moving(2), hdr=True)


def test_an_aborted_delivery_leaves_nothing(tmp_path: Path) -> None:
    for format in ("mp4", "png_sequence", "prores"):
        delivery = Delivery(tmp_path, format=format, width=96, height=64, fps=8, frames=3, info={})
        delivery.write(disc(60)[None])
        delivery.abort()
        assert not list(tmp_path.iterdir()), format


# -- operations on finished clips ----------------------------------------------------------------------------


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    path = tmp_path / "clip.mp4"
    with VideoWriter(path, width=160, height=96, fps=8) as writer:
        for frame in moving():
            writer.write(frame)
    return path


def run(planned: Any, folder: Path, **options: Any) -> Path:
    folder.mkdir()
    delivery = Delivery(folder, format="mp4", width=planned.width, height=planned.height, fps=planned.fps,
                        frames=planned.frames, info={}, **options)  # fmt: skip
    for frame in frames_of(planned):
        delivery.write(frame[None])
    return folder / delivery.close()[0].name


def test_upscale(clip: Path, tmp_path: Path) -> None:
    planned = plan_operation("upscale", clip, scale=2)
    assert (planned.width, planned.height, planned.frames, planned.fps) == (320, 192, 9, 8.0)
    large = read_clip(run(planned, tmp_path / "out"), max_frames=20).frames
    assert large.shape == (9, 192, 320, 3)
    assert centre(large[3]) == pytest.approx(2 * centre(moving()[3]) + 0.5, abs=1)
    with pytest.raises(RequestError, match="smaller than the source"):
        plan_operation("upscale", clip, size=(80, 48))
    with pytest.raises(RequestError, match="too large"):
        plan_operation("upscale", clip, scale=100)


def test_reframe_rate(clip: Path, tmp_path: Path) -> None:
    planned = plan_operation("reframe_rate", clip, fps=24)
    assert (planned.width, planned.frames, planned.fps) == (160, 27, 24)
    info = probe(run(planned, tmp_path / "out"))
    assert (info.frames, info.fps) == (27, 24)
    with pytest.raises(RequestError, match="Give fps"):
        plan_operation("reframe_rate", clip)


def test_hdr_of_a_clip(clip: Path, tmp_path: Path) -> None:
    planned = plan_operation("hdr", clip)
    path = run(planned, tmp_path / "out", hdr=True)
    assert len(list(decoded(path))) == 9


def test_upscale_of_a_picture(tmp_path: Path) -> None:
    source = tmp_path / "a.png"
    Image.fromarray(disc(60)).save(source)
    planned = plan_operation("upscale", source, size=(640, 384))
    assert (planned.is_still, planned.frames) == (True, 1)
    (frame,) = frames_of(planned)
    assert (frame == disc(60)).all()
    with pytest.raises(RequestError, match="is a picture"):
        plan_operation("reframe_rate", source, fps=24)
