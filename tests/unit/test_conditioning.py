"""What the model is shown for every task: frames, mask (1 = generate) and references, and their 96 channels.

Expected values are written out from the official rules (ali-vilab/VACE 48eb44f) or computed here in the most plain
way; the encoding is also compared with diffusers' own helpers.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mutoscope.engine.conditioning import GRAY, Prepared, compose, dump, mask_channels, prepare, vace_context
from mutoscope.engine.vae import VAEConfig, WanVAE
from mutoscope.errors import MediaError, MutoscopeError, RequestError
from mutoscope.media.frames import to_gray
from mutoscope.media.read import read_image
from mutoscope.media.write import VideoWriter, write_image
from mutoscope.planning import check_conditioning
from mutoscope.request import BoxTrack, Conditioning, Keyframe, Outpaint

WIDTH, HEIGHT, FRAMES = 48, 32, 9
RNG = np.random.default_rng(0)


def picture(width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    """Read-only, as pictures from files are."""
    pixels = RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)
    pixels.setflags(write=False)
    return pixels


def clip(n: int = FRAMES, width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    return RNG.integers(0, 256, (n, height, width, 3), dtype=np.uint8)


def made(n_frames: int = FRAMES, **fields: Any) -> Prepared:
    return prepare(Conditioning(**fields), WIDTH, HEIGHT, n_frames)


def assert_frames(prepared: Prepared, shown: dict[int, np.ndarray]) -> None:
    """Exactly these frames are kept as they are; all others are gray and to be generated."""
    for i in range(len(prepared.frames)):
        assert (prepared.frames[i] == shown.get(i, GRAY)).all(), f"frame {i}"
        assert (prepared.mask[i] == (i not in shown)).all(), f"mask {i}"


# -- tasks ---------------------------------------------------------------------------------------------------


def test_text_only_is_gray_and_all_to_be_generated() -> None:
    prepared = made()
    assert_frames(prepared, {})
    assert prepared.frames.shape == (FRAMES, HEIGHT, WIDTH, 3)
    assert prepared.references == ()
    assert GRAY == 127.5, "the official gray is between two bytes"


@pytest.mark.parametrize(
    ("asked", "meant"),
    [([0], [0]), ([-1], [8]), ([0, -1], [0, 8]), ([3], [3]), ([-9], [0]), ([2, 5, -2], [2, 5, 7])],
)
def test_keyframes_fill_their_frames(asked: list[int], meant: list[int]) -> None:
    pictures = [picture() for _ in asked]
    keyframes = tuple(Keyframe(image=p, index=i) for p, i in zip(pictures, asked, strict=True))
    assert_frames(made(keyframes=keyframes), dict(zip(meant, pictures, strict=True)))


def test_a_keyframe_of_another_shape_covers_the_frame() -> None:
    wide = np.zeros((HEIGHT, 4 * WIDTH, 3), np.uint8)
    wide[:, 2 * WIDTH - 24 : 2 * WIDTH + 24] = 200
    prepared = made(keyframes=(Keyframe(image=wide),))
    assert (prepared.frames[0] == 200).all(), "the middle is taken, nothing is squeezed or padded"


def test_extend_at_the_start_keeps_the_end_of_the_clip() -> None:
    long, short = clip(20), clip(3)
    assert_frames(made(extend_start=long), {i: long[16 + i] for i in range(4)})
    assert_frames(made(extend_start=short), {i: short[i] for i in range(3)})


def test_extend_at_the_end_keeps_the_start_of_the_clip() -> None:
    long, short = clip(20), clip(3)
    assert_frames(made(extend_end=long), {5 + i: long[i] for i in range(4)})
    assert_frames(made(extend_end=short), {6 + i: short[i] for i in range(3)})


def test_extend_at_both_ends_leaves_something_to_generate() -> None:
    before, after = clip(20), clip(20)
    shown = {0: before[18], 1: before[19], 3: after[0], 4: after[1]}
    assert_frames(made(5, extend_start=before, extend_end=after), shown)


def test_a_clip_to_extend_is_brought_to_the_rate_of_the_video(tmp_path: Path) -> None:
    """Else a clip at 16 fps, continued at 8 fps, would be played at half its speed."""
    path = tmp_path / "in.gif"
    levels = np.arange(10, 250, 20)
    with VideoWriter(path, width=WIDTH, height=HEIGHT, fps=10) as writer:
        for level in levels:
            writer.write(np.full((HEIGHT, WIDTH, 3), level, np.uint8))
    prepared = prepare(Conditioning(extend_start=path), WIDTH, HEIGHT, FRAMES, 5.0)
    steps = np.diff(prepared.frames[:4].astype(float).mean(axis=(1, 2, 3)))
    assert np.allclose(steps, 40, atol=6), f"every other frame expected, brightness grows by {steps}"


def test_layers_keyframe_over_extension_over_source() -> None:
    source, before, first = clip(), clip(2), picture()
    prepared = made(video=source, extend_start=before, keyframes=(Keyframe(image=first),))
    assert (prepared.frames[0] == first).all()
    assert (prepared.frames[1] == before[1]).all()
    assert (prepared.frames[2:] == source[2:]).all()
    assert [m.any() for m in prepared.mask] == [False, False] + 7 * [True]


def test_control_is_shown_and_generated() -> None:
    source = clip()
    prepared = made(video=source)
    assert (prepared.frames == source).all()
    assert (prepared.mask == 1).all()
    assert (made(video=source, control="gray").frames == to_gray(source)).all()


def test_a_longer_source_is_sampled_evenly_as_a_whole() -> None:
    source = clip(33)
    assert (made(video=source).frames == source[::4]).all()


def test_repaint_hides_what_a_mask_picture_marks() -> None:
    source = clip()
    mask = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    mask[4:20, 8:30] = 255
    prepared = made(video=source, mask=mask)
    inside = np.broadcast_to(mask[..., 0] == 255, (FRAMES, HEIGHT, WIDTH))
    assert (prepared.mask == inside).all()
    assert (prepared.frames[inside] == GRAY).all()
    assert (prepared.frames[~inside] == source[~inside]).all()


def test_a_mask_is_cut_at_one_half_of_its_first_channel() -> None:
    mask = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    mask[:, :16, 0], mask[:, 16:32, 0], mask[:, 32:, 0] = 127, 128, 200
    mask[:8, :16, 1:] = 255  # other channels do not count
    prepared = made(video=clip(), mask=mask)
    assert prepared.mask[0, 0].tolist() == 16 * [0] + 32 * [1]
    assert set(np.unique(prepared.mask)) == {0, 1}


def test_a_mask_clip_is_sampled_with_its_source() -> None:
    source, mask = clip(33), np.zeros((33, HEIGHT, WIDTH, 3), np.uint8)
    mask[8, :5] = 255  # of frame 2 of 9
    prepared = made(video=source, mask=mask)
    assert [int(m.sum()) for m in prepared.mask] == [0, 0, 5 * WIDTH, 0, 0, 0, 0, 0, 0]
    assert (prepared.frames[2, 5:] == source[8, 5:]).all()


def test_boxes_are_repainted() -> None:
    prepared = made(video=clip(), boxes=((0.25, 0.5, 0.75, 1.0), (0.0, 0.0, 0.29, 0.1)))
    expected = np.zeros((HEIGHT, WIDTH), int)
    expected[16:32, 12:36] = 1
    expected[0:3, 0:14] = 1
    assert (prepared.mask == expected).all()
    assert (prepared.frames[prepared.mask == 1] == GRAY).all()


def test_boxes_round_to_the_nearest_pixel() -> None:
    """0.29 of 100 pixels is 28.999999999999996 in binary."""
    prepared = prepare(Conditioning(video=clip(1), boxes=((0.29, 0.0, 0.30, 1.0),)), 100, 32, 1)
    assert np.flatnonzero(prepared.mask[0, 0]).tolist() == [29]
    prepared = prepare(Conditioning(video=clip(1), boxes=((0.999, 0.999, 1.0, 1.0),)), 16, 16, 1)
    assert int(prepared.mask.sum()) == 1, "never empty"


@pytest.mark.parametrize(
    ("margin", "left", "right", "top", "bottom"),
    [
        (Outpaint(left=0.5, right=0.5), 12, 12, 0, 0),
        (Outpaint(right=0.5), 0, 16, 0, 0),
        (Outpaint(top=1.0), 0, 0, 16, 0),
        (Outpaint(left=0.25, right=0.25, top=0.25, bottom=0.25), 8, 8, 6, 5),
        (Outpaint(left=0.1), 4, 0, 0, 0),  # 43.6 + 4.4: no sliver on the right
        (Outpaint(left=1.0, right=3.0, bottom=1.0), 10, 28, 0, 16),
    ],
)
def test_outpaint(margin: Outpaint, left: int, right: int, top: int, bottom: int) -> None:
    source = np.full((FRAMES, HEIGHT, WIDTH, 3), 70, np.uint8)
    prepared = made(video=source, outpaint=margin)
    expected = np.ones((HEIGHT, WIDTH), int)
    expected[top : HEIGHT - bottom, left : WIDTH - right] = 0
    assert (prepared.mask == expected).all()
    assert (prepared.frames == np.where(expected[..., None], GRAY, 70)).all()


def test_references_keep_their_order_on_white() -> None:
    tall, same = np.full((64, 32, 3), 10, np.uint8), picture()
    first, second = made(references=(tall, same)).references
    assert (second == same).all()
    assert (first[:, 16:32] == 10).all()
    assert (np.delete(first, np.s_[16:32], axis=1) == 255).all()


def test_a_box_track_is_drawn_black_on_white() -> None:
    track = BoxTrack(points=((0.0, 0.0, 0.0, 0.25, 0.5), (1.0, 0.5, 0.5, 0.75, 1.0)))
    prepared = made(tracks=(track,))
    assert (prepared.mask == 1).all()
    for i, frame in enumerate(prepared.frames):
        left, top = 3 * i, 2 * i
        expected = np.full((HEIGHT, WIDTH, 3), 255)
        expected[top : top + 16, left : left + 12] = 0
        expected[top + 2 : top + 14, left + 2 : left + 10] = 255
        assert (frame == expected).all(), f"frame {i}"


def test_a_box_rests_outside_of_its_times_and_small_ones_are_filled() -> None:
    track = BoxTrack(points=((0.5, 0.5, 0.5, 0.5 + 3 / WIDTH, 0.5 + 3 / HEIGHT),))
    prepared = made(tracks=(track,))
    assert (prepared.frames == prepared.frames[0]).all()
    assert np.argwhere(prepared.frames[0, ..., 0] == 0).tolist() == [
        [y, x] for y in (16, 17, 18) for x in (24, 25, 26)
    ]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(*[st.floats(0, 1)] * 3), min_size=1, max_size=4))
def test_no_rounding_moves_a_box_out_of_the_frame(points: list[tuple[float, float, float]]) -> None:
    track = BoxTrack(points=tuple((t, x * 0.7, y * 0.7, x * 0.7 + 0.3, 1.0) for t, x, y in points))
    assert (made(5, tracks=(track,)).frames == 0).any(axis=(1, 2, 3)).all()


def test_a_picture_moves_along_a_track() -> None:
    """VACE's "move anything": the picture is frame 0 and kept, the layout is shown in the others."""
    first, track = picture(), BoxTrack(points=((0.0, 0.1, 0.1, 0.5, 0.5),))
    prepared = made(keyframes=(Keyframe(image=first),), tracks=(track,))
    layout = made(tracks=(track,))
    assert (prepared.frames[0] == first).all()
    assert not prepared.mask[0].any()
    assert (prepared.frames[1:] == layout.frames[1:]).all()
    assert (prepared.mask[1:] == 1).all()


def test_files_are_read_like_arrays(tmp_path: Path) -> None:
    image, mask = picture(), np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    mask[:9] = 255
    frames = clip(5)
    write_image(tmp_path / "image.png", image)
    write_image(tmp_path / "mask.png", mask)
    with VideoWriter(tmp_path / "%02d.png", width=WIDTH, height=HEIGHT, fps=8) as writer:
        for frame in frames:
            writer.write(frame)
    from_files = made(5, video=frames, mask=tmp_path / "mask.png", references=(str(tmp_path / "image.png"),))
    from_arrays = made(5, video=frames, mask=mask, references=(image,))
    assert (from_files.frames == from_arrays.frames).all()
    assert (from_files.mask == from_arrays.mask).all()
    assert (from_files.references[0] == image).all()


# -- composition ---------------------------------------------------------------------------------------------


def part(kind: str, level: float, box: tuple[slice, ...] = np.s_[:]) -> Prepared:
    """A conditioning of one kind, its pictures all of one gray level."""
    frames, mask = np.full((5, 16, 16, 3), GRAY, np.float16), np.ones((5, 16, 16), np.uint8)
    if kind == "control":
        frames[:] = level
    elif kind == "extension":
        frames[box], mask[box] = level, 0
    else:
        frames[:], mask[:] = level, 0
        frames[box], mask[box] = GRAY, 1
    return Prepared(frames, mask, (), kind)  # type: ignore[arg-type]


PARTS = {
    "control": (part("control", 10), part("control", 20)),
    "extension": (part("extension", 30, np.s_[:2]), part("extension", 40, np.s_[1:3])),
    "repaint": (part("repaint", 50, np.s_[:, :8]), part("repaint", 60, np.s_[:, 4:12, :5])),
}


def official(first: Prepared, second: Prepared) -> tuple[np.ndarray, np.ndarray]:
    """The table of `CompositionAnnotator`, pixel arithmetic as it is there."""
    f1, f2, m1, m2 = (x.astype(float) for x in (first.frames, second.frames, first.mask, second.mask))
    pair = (first.kind, second.kind)
    if pair == ("control", "repaint"):
        f1, f2, m1, m2 = f2, f1, m2, m1
        pair = ("repaint", "control")
    p1, p2 = m1[..., None], m2[..., None]
    if pair[0] == "extension":
        return f2 * p1 + f1 * (1 - p1), m1 * m2
    if pair == ("repaint", "control"):
        return f1 * (1 - p1) + f2 * p1, m1
    return f1 * (1 - p2) + f2 * p2, m1 * (1 - m2) + m2 * m2


@pytest.mark.parametrize("second", PARTS)
@pytest.mark.parametrize("first", PARTS)
def test_composition_follows_the_official_table(first: str, second: str) -> None:
    a, b = PARTS[first][0], PARTS[second][1]
    got, (frames, mask) = compose(a, b), official(a, b)
    assert (got.frames == frames).all()
    assert (got.mask == mask).all()


def test_composition_of_requests() -> None:
    source, control = clip(), clip()
    repaint = Conditioning(video=source, boxes=((0.0, 0.0, 0.5, 1.0),), references=(picture(),))
    one = prepare(replace(repaint, compose=Conditioning(video=control)), WIDTH, HEIGHT, FRAMES)
    other = prepare(Conditioning(video=control, compose=repaint), WIDTH, HEIGHT, FRAMES)
    for prepared in (one, other):
        assert (prepared.frames[:, :, :24] == control[:, :, :24]).all()
        assert (prepared.frames[:, :, 24:] == source[:, :, 24:]).all()
        assert (prepared.mask == made(video=source, boxes=repaint.boxes).mask).all()
        assert len(prepared.references) == 1
    two_boxes = prepare(
        replace(repaint, compose=Conditioning(video=source, boxes=((0.5, 0.0, 0.75, 1.0),))),
        WIDTH,
        HEIGHT,
        FRAMES,
    )
    assert np.flatnonzero(two_boxes.mask[0, 0]).tolist() == list(range(36))
    keyframe = Conditioning(keyframes=(Keyframe(image=source[0]),), compose=Conditioning(video=control))
    prepared = prepare(keyframe, WIDTH, HEIGHT, FRAMES)
    assert (prepared.frames == np.concatenate((source[:1], control[1:]))).all()


def test_composition_with_references_alone_changes_nothing_else() -> None:
    subject, keyframe = (
        picture(),
        Conditioning(keyframes=(Keyframe(image=picture()),), references=(picture(),)),
    )
    only = Conditioning(references=(subject,))
    alone = prepare(keyframe, WIDTH, HEIGHT, FRAMES)
    after = prepare(replace(keyframe, compose=only), WIDTH, HEIGHT, FRAMES)
    before = prepare(replace(only, compose=keyframe), WIDTH, HEIGHT, FRAMES)
    for prepared in (before, after):
        assert (prepared.frames == alone.frames).all()
        assert (prepared.mask == alone.mask).all()
        assert prepared.kind == alone.kind == "extension"
    assert (after.references[1] == subject).all()
    assert (before.references[0] == subject).all()


# -- errors --------------------------------------------------------------------------------------------------

BOX = (0.0, 0.0, 0.5, 0.5)
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "mask alone": ({"mask": picture()}, "without a source video"),
    "boxes alone": ({"boxes": (BOX,)}, "without a source video"),
    "mask and boxes": ({"video": clip(), "mask": picture(), "boxes": (BOX,)}, "Both a mask and boxes"),
    "outpaint alone": ({"outpaint": Outpaint(left=1)}, "needs a source video"),
    "outpaint and mask": (
        {"video": clip(), "outpaint": Outpaint(left=1), "mask": picture()},
        "makes its own mask",
    ),
    "outpaint of nothing": ({"video": clip(), "outpaint": Outpaint()}, "at least one above 0"),
    "outpaint negative": ({"video": clip(), "outpaint": Outpaint(left=-1)}, "of 0 to 4"),
    "tracks and video": ({"video": clip(), "tracks": (BoxTrack(points=((0, *BOX),)),)}, "compose"),
    "empty track": ({"tracks": (BoxTrack(points=()),)}, "without points"),
    "late track": ({"tracks": (BoxTrack(points=((1.5, *BOX),)),)}, "1.5, expected 0 to 1"),
    "flat track": ({"tracks": (BoxTrack(points=((0, 0.5, 0, 0.5, 1),)),)}, "x0 < x1"),
    "box outside": ({"video": clip(), "boxes": ((0, 0, 1.2, 1),)}, "1.2"),
    "box upside down": ({"video": clip(), "boxes": ((0.5, 0, 0.2, 1),)}, "x0 < x1"),
    "box not a number": ({"video": clip(), "boxes": ((float("nan"), 0, 1, 1),)}, "nan"),
    "keyframe late": ({"keyframes": (Keyframe(image=picture(), index=9),)}, "video of 9 frames"),
    "keyframe early": ({"keyframes": (Keyframe(image=picture(), index=-10),)}, "-9 to 8"),
    "keyframe twice": (
        {"keyframes": (Keyframe(image=picture(), index=8), Keyframe(image=picture(), index=-1))},
        "Frame 8 has two keyframes",
    ),
    "keyframe of floats": ({"keyframes": (Keyframe(image=np.zeros((8, 8, 3), np.float32)),)}, "float32"),
    "short control": ({"video": clip(8)}, "control clip has 8 frames, 9 are needed. Ask for 5"),
    "short source": ({"video": clip(3), "boxes": (BOX,)}, "source video has 3 frames"),
    "picture as clip": ({"video": picture()}, "[F, H, W, 3]"),
    "clip as picture": ({"references": (clip(),)}, "[H, W, 3]"),
    "mask of other length": ({"video": clip(), "mask": clip(7)}, "The mask has 7 frames, its video 9"),
    "gray without clip": ({"control": "gray"}, "without a control clip"),
    "gray repaint": ({"control": "gray", "video": clip(), "boxes": (BOX,)}, "without a control clip"),
    "unknown control": ({"control": "grey", "video": clip()}, "'grey'"),
    "strength": ({"strength": -1.0}, "strength = -1.0"),
    "strength within": ({"compose": Conditioning(strength=0.5)}, "inside of `compose`"),
    "within compose": ({"compose": Conditioning(boxes=(BOX,))}, "without a source video"),
    "missing file": ({"references": ("nowhere.png",)}, "nowhere.png"),
}


@pytest.mark.parametrize(("fields", "message"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_is_refused_before_work(fields: dict[str, Any], message: str) -> None:
    """By the checks that `plan` makes, without reading clips, and so before a model is opened."""
    with pytest.raises((RequestError, MediaError)) as caught:
        check_conditioning(Conditioning(**fields), FRAMES)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"video": clip(), "mask": np.zeros((HEIGHT, WIDTH, 3), np.uint8)},
        {"keyframes": tuple(Keyframe(image=picture(), index=i) for i in range(FRAMES))},
    ],
)
def test_nothing_to_generate_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(RequestError, match="nothing would be generated"):
        made(**fields)


def test_one_frame_cannot_extend() -> None:
    with pytest.raises(RequestError, match="cannot extend"):
        check_conditioning(Conditioning(extend_start=clip()), 1)


# -- the channels --------------------------------------------------------------------------------------------


def plain_mask_channels(mask: np.ndarray) -> np.ndarray:
    """Channel 8 * row + column of each 8 x 8 cell; of F frames the middle one of each of 1 + (F-1)/4 equal parts."""
    n_frames, height, width = mask.shape
    n_latent = 1 + (n_frames - 1) // 4
    out = np.zeros((64, n_latent, height // 8, width // 8))
    for t in range(n_latent):
        picked = mask[int((t + 0.5) * n_frames / n_latent)]
        for y in range(height):
            for x in range(width):
                out[8 * (y % 8) + x % 8, t, y // 8, x // 8] = picked[y, x]
    return out


@pytest.mark.parametrize("n_frames", [1, 5, 17, 81])
def test_mask_channels(n_frames: int) -> None:
    mask = RNG.integers(0, 2, (n_frames, 16, 32), dtype=np.uint8)
    assert np.array_equal(mask_channels(mask)[0].numpy(), plain_mask_channels(mask))


@pytest.mark.parametrize("n_frames", [5, 17, 81])
def test_the_mask_of_a_first_frame_alone_is_not_picked(n_frames: int) -> None:
    """Surprising but official: latent frame 0 takes the mask of frame 1. Models were trained like this."""
    prepared = made(n_frames, keyframes=(Keyframe(image=picture()),))
    assert (mask_channels(prepared.mask) == 1).all()
    two = (Keyframe(image=picture()), Keyframe(image=picture(), index=1))
    assert (mask_channels(made(n_frames, keyframes=two).mask)[:, :, 0] == 0).all()


CONFIG = VAEConfig(
    8, 4, (8, 8, 8, 8), 1, (False, True, True), mean=(0.1, -0.4, 0.7, 0.0), std=(1.5, 0.8, 2.0, 1.0),
    rgb=((0.0, 0.0, 0.0),) * 5,
)  # fmt: skip


@pytest.fixture(scope="module")
def vae() -> Iterator[WanVAE]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    rng = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        network = WanVAE(CONFIG).eval()
        for name, parameter in network.named_parameters():
            noise = torch.randn(parameter.shape, generator=rng)
            is_norm = name.endswith("gamma")
            parameter.copy_(1 + 0.1 * noise if is_norm else noise / max(1, parameter[0].numel()) ** 0.5)
        yield network
    torch.set_num_threads(threads)


def plain_context(vae: WanVAE, prepared: Prepared) -> Tensor:
    """As the specification says it, clip by clip."""

    def encode(frames: np.ndarray) -> Tensor:
        return vae.encode(torch.from_numpy(frames).permute(3, 0, 1, 2)[None].float())

    pixels = prepared.frames.astype(np.float64) / 127.5 - 1
    mask = prepared.mask[..., None].astype(np.float64)
    inactive, reactive = encode(pixels * (1 - mask)), encode(pixels * mask)
    cells = torch.from_numpy(plain_mask_channels(prepared.mask)).float()[None]
    context = torch.cat((inactive, reactive, cells), dim=1)
    for reference in reversed(prepared.references):
        latent = encode(reference[None] / 127.5 - 1)
        context = torch.cat(
            (torch.cat((latent, torch.zeros(1, 68, *latent.shape[2:])), dim=1), context), dim=2
        )
    return context


CASES: dict[str, dict[str, Any]] = {
    "text": {},
    "first frame": {"keyframes": (Keyframe(image=picture()),)},
    "control and references": {"video": clip(), "references": (picture(), picture(20, 50))},
    "repaint": {"video": clip(), "mask": np.where(clip() > 150, 255, 0).astype(np.uint8)},
    "references": {"references": (picture(), picture(), picture())},
}


@pytest.mark.parametrize("fields", CASES.values(), ids=CASES)
def test_context(vae: WanVAE, fields: dict[str, Any]) -> None:
    prepared = made(**fields)
    context = vace_context(prepared, vae.encode_stream)
    n_latent = 3 + len(prepared.references)
    assert context.shape == (1, 2 * 4 + 64, n_latent, HEIGHT // 8, WIDTH // 8)
    assert context.dtype == torch.float32
    torch.testing.assert_close(context, plain_context(vae, prepared), rtol=1e-5, atol=1e-5)


def test_the_two_halves_can_be_told_apart(vae: WanVAE) -> None:
    """The comparison above must be able to fail: what is kept is in the first half only, the rest in the second."""
    prepared = made(**CASES["repaint"])
    got = vace_context(prepared, vae.encode_stream)
    expected = plain_context(vae, replace(prepared, mask=1 - prepared.mask))
    assert (got[:, :8] - expected[:, :8]).abs().max() > 0.1
    torch.testing.assert_close(got[:, :4], expected[:, 4:8], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fields", CASES.values(), ids=CASES)
def test_context_against_diffusers(vae: WanVAE, fields: dict[str, Any]) -> None:
    """Live against `WanVACEPipeline`: its encoding of frames, mask and references, with our VAE inside.

    It prepends references one after the other and so turns their order round (the official code does not), hence
    `reversed`; and without references its `prepare_masks` wants an empty list.
    """
    from diffusers.pipelines.wan.pipeline_wan_vace import WanVACEPipeline

    mean, std = (torch.tensor(v).view(1, -1, 1, 1, 1) for v in (CONFIG.mean, CONFIG.std))

    class Encoded:
        def __init__(self, latents: Tensor) -> None:
            self.latents = latents * std + mean  # they normalise by themselves

    pipeline = SimpleNamespace(
        vae=SimpleNamespace(
            dtype=torch.float32,
            config=SimpleNamespace(latents_mean=CONFIG.mean, latents_std=CONFIG.std, z_dim=4),
            encode=lambda video: Encoded(vae.encode(video)),
        ),
        transformer=SimpleNamespace(config=SimpleNamespace(patch_size=(1, 2, 2))),
        vae_scale_factor_temporal=4,
        vae_scale_factor_spatial=8,
    )
    prepared = made(**fields)
    video = torch.from_numpy(prepared.frames).float().permute(3, 0, 1, 2)[None] / 127.5 - 1
    mask = torch.from_numpy(prepared.mask).float()[None, None].expand(1, 3, -1, -1, -1)
    pictures = [
        torch.from_numpy(r.copy()).float().permute(2, 0, 1) / 127.5 - 1 for r in reversed(prepared.references)
    ]
    device = torch.device("cpu")
    latents = WanVACEPipeline.prepare_video_latents(pipeline, video, mask, [pictures], device=device)
    channels = WanVACEPipeline.prepare_masks(pipeline, mask, [pictures])
    expected = torch.cat((latents, channels), dim=1)
    torch.testing.assert_close(vace_context(prepared, vae.encode_stream), expected, rtol=1e-5, atol=1e-5)


def test_all_gray_is_encoded_once(vae: WanVAE) -> None:
    calls = []

    def encode(chunks: Iterator[Tensor]) -> Iterator[Tensor]:
        calls.append(1)
        return vae.encode_stream(chunks)

    vace_context(made(), encode)
    assert len(calls) == 1
    vace_context(made(keyframes=(Keyframe(image=picture()),), references=(picture(),)), encode)
    assert len(calls) == 1 + 3


# -- dump ----------------------------------------------------------------------------------------------------


def test_dump_shows_what_the_model_is_given(tmp_path: Path) -> None:
    first, subject = picture(), picture()
    prepared = made(5, keyframes=(Keyframe(image=first),), references=(subject, picture()))
    written = dump(prepared, tmp_path / "new" / "folder", fps=8)
    assert [p.name for p in written] == ["frames", "mask", "reference-1.png", "reference-2.png"]
    frames = [read_image(p) for p in sorted(written[0].iterdir())]
    masks = [read_image(p) for p in sorted(written[1].iterdir())]
    assert len(frames) == len(masks) == 5
    assert (frames[0] == first).all()
    assert all((f == 128).all() for f in frames[1:]), "127.5, rounded"
    assert (masks[0] == 0).all()
    assert all((m == 255).all() for m in masks[1:])
    assert (read_image(written[2]) == subject).all()


def test_a_dump_does_not_replace_another(tmp_path: Path) -> None:
    dump(made(1), tmp_path, fps=8)
    with pytest.raises(MutoscopeError, match="not an empty folder"):
        dump(made(1), tmp_path, fps=8)


# -- documentation -------------------------------------------------------------------------------------------


def test_every_field_is_documented() -> None:
    text = (Path(__file__).parents[2] / "docs" / "conditioning.md").read_text("utf-8")
    for field in fields(Conditioning):
        assert f"{field.name}=" in text, field.name
    from mutoscope.cli.generate import generate

    options = {name.replace("_", "-") for name in inspect.signature(generate).parameters}
    for option in set(re.findall(r"--([a-z][a-z-]*)", text)):
        assert option in options, f"--{option} is no option of generate"
