"""The toy world, its captions and its detector: ground truth is read back, and mutants are noticed."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("scipy")
from scipy import ndimage

from training import captions, world
from training.detect import Detection, detect, placed
from training.world import Object, Scene


def scenes(level: str, n: int, seed: int, **options: object) -> list[Scene]:
    rng = np.random.default_rng(seed)
    return [world.sample(rng, level=level, held_out=None, **options) for _ in range(n)]


def mistakes(scene: Scene, found: Detection) -> dict[str, tuple[object, object]]:
    """What the detector got wrong: attribute -> (got, expected). Objects are matched by colour."""
    pairs = {n: (getattr(found, n), getattr(scene, n)) for n in ("background", "background_style", "camera")}
    by_color = {o.color: o for o in found.objects}
    for i, thing in enumerate(scene.objects):
        for name in ("color", "shape", "size", "motion"):
            pairs[f"{name} {i}"] = (getattr(by_color.get(thing.color), name, None), getattr(thing, name))
    return {name: (got, want) for name, (got, want) in pairs.items() if got != want}


def blurred(clip: np.ndarray, rng: np.random.Generator, sigma: float = 1.0, noise: float = 6.0) -> np.ndarray:
    """About what a small decoder does to a clip: 27 to 29 dB."""
    soft = ndimage.gaussian_filter(clip.astype(np.float32), (0, sigma, sigma, 0))
    return np.clip(soft + rng.normal(0, noise, clip.shape), 0, 255).astype(np.uint8)


# --------------------------------------------------------------------------------------------------- world


def test_render_is_deterministic_and_of_the_asked_size() -> None:
    one, two = scenes("full", 10, seed=5), scenes("full", 10, seed=5)
    assert one == two
    for scene in one:
        np.testing.assert_array_equal(world.render(scene), world.render(scene))
    for width, height, frames in ((96, 64, 25), (64, 112, 33), (128, 128, 17)):
        clip = world.render(replace(one[0], width=width, height=height, frames=frames))
        assert clip.shape == (frames, height, width, 3)
        assert clip.dtype == np.uint8


def test_the_picture_does_not_depend_on_the_number_of_frames() -> None:
    scene = scenes("full", 1, seed=6)[0]
    np.testing.assert_array_equal(world.render(scene)[::8], world.render(replace(scene, frames=33))[::16])


def test_held_out_combinations_are_never_sampled_for_training() -> None:
    rng = np.random.default_rng(7)
    for level in world.LEVELS:
        for _ in range(500):
            assert not world.is_held_out(world.sample(rng, level=level))
            assert world.is_held_out(world.sample(rng, level=level, held_out=True))


def test_every_attribute_is_plentiful_in_training() -> None:
    rng = np.random.default_rng(8)
    rules, counts, n = world.LEVELS["first"], Counter(), 3000
    for _ in range(n):
        scene = world.sample(rng, level="first")
        thing = scene.objects[0]
        counts.update([thing.shape, thing.color, thing.size, thing.motion, scene.background_style])
        counts.update([f"on {scene.background}"])
    for values in (world.SHAPES, rules.colors, rules.motions, [f"on {b}" for b in world.BACKGROUNDS]):
        for value in values:
            assert counts[value] > 0.5 * n / len(values), value


def test_objects_stay_in_the_frame_and_directions_are_visible() -> None:
    for scene in scenes("first", 300, seed=9):
        track, thing = world.tracks(scene)[0], scene.objects[0]
        side, up, down = (r * track.radius for r in world.REACH[thing.shape])
        if thing.motion != "spins":
            assert (track.centre[:, 0] - side).min() > -0.02
            assert (track.centre[:, 0] + side).max() < 1.02
            assert (track.centre[:, 1] - up).min() > -0.02
            assert (track.centre[:, 1] + down).max() < 1.02
        if thing.motion in world.DIRECTIONS:
            assert 0.34 < np.abs(track.centre[-1] - track.centre[0]).max() < 0.56
        if thing.motion == "spins":
            assert abs(track.angle[-1] - track.angle[0]) > np.radians(120)


def test_a_fall_is_a_parabola_and_bounces() -> None:
    t = np.linspace(0, 1, 1001)
    y = world.fall(0.3, 0.8, t)
    lands = np.sqrt(2 * 0.5 / world.GRAVITY)
    before = t < lands
    np.testing.assert_allclose(y[before], 0.3 + world.GRAVITY * t[before] ** 2 / 2, atol=1e-6)
    assert y.max() <= 0.8
    after = (t > lands) & (t < lands + 2 * world.RESTITUTION * lands)
    assert 0.8 - y[after].min() == pytest.approx(0.5 * world.RESTITUTION**2, abs=1e-4)  # height of the bounce
    bend = np.diff(y[after], 2) / (t[1] - t[0]) ** 2
    np.testing.assert_allclose(bend[2:-2], world.GRAVITY, atol=1e-3)


def test_masks_and_boxes_agree_with_the_tracks() -> None:
    for scene in scenes("first", 30, seed=10):
        mask, box, track = world.object_masks(scene)[0], world.boxes(scene)[0], world.tracks(scene)[0]
        assert mask.shape == (scene.frames, scene.height, scene.width)
        columns = np.arange(scene.width) + 0.5
        x = (mask.sum(1) * columns).sum(1) / mask.sum((1, 2)) / scene.width
        np.testing.assert_allclose(x, track.centre[:, 0], atol=0.01)
        assert (box[:, 0] / scene.width <= track.centre[:, 0]).all()
        assert (box[:, 2] / scene.width >= track.centre[:, 0]).all()


# ------------------------------------------------------------------------------------------------ captions


def test_vocabulary_is_exact() -> None:
    rng, seen = np.random.default_rng(11), {"train": set(), "heldout": set()}
    for scene in scenes("full", 3000, seed=12):
        for split, words in seen.items():
            words.update(captions.words(captions.caption(scene, rng, split)))
    assert sorted(seen["train"]) == captions.vocabulary()
    assert seen["heldout"] <= seen["train"]


def test_captions_name_what_matters() -> None:
    rng = np.random.default_rng(13)
    named = 0
    for scene in scenes("full", 500, seed=14):
        heldout = captions.caption(scene, rng, "heldout")
        assert scene.background in heldout
        for thing in scene.objects:
            assert thing.color in heldout
            assert any(noun in heldout for noun in captions.NOUNS[thing.shape])
        named += "background" in captions.caption(scene, rng)
    assert named > 450
    with pytest.raises(ValueError, match="heldout"):
        captions.caption(scene, rng, "test")


def test_held_out_phrasings_are_not_trained_on() -> None:
    train = {*captions.TRAIN_TEMPLATES, *captions.TRAIN_QUICK_TEMPLATES, *captions.BARE_TEMPLATES}
    assert not train & set(captions.HELD_OUT_TEMPLATES)
    assert not set(captions.PAIR_TEMPLATES) & set(captions.HELD_OUT_PAIR_TEMPLATES)


def test_attributes_are_below_their_sizes() -> None:
    """Those of a pair are there with it, and say which is where."""
    of_pairs = {"relation"} | {
        f"{p} {name}" for p in ("near", "far") for name in ("shape", "color", "motion")
    }
    for scene in scenes("full", 200, seed=15):
        numbers = captions.attributes(scene)
        assert numbers.keys() == captions.ATTRIBUTE_SIZES.keys()
        there = {name: number for name, number in numbers.items() if number != captions.NO_CLASS}
        assert all(0 <= number < captions.ATTRIBUTE_SIZES[name] for name, number in there.items())
        assert numbers.keys() - there.keys() == (of_pairs if len(scene.objects) == 1 else set())
        if len(scene.objects) == 2:
            first, second = world.tracks(scene)
            axis = 0 if scene.relation in ("left of", "right of") else 1
            near = 0 if first.centre[0, axis] < second.centre[0, axis] else 1
            assert numbers["near color"] == captions.class_of("color", scene.objects[near].color)
            assert numbers["far shape"] == captions.class_of("shape", scene.objects[1 - near].shape)


# ------------------------------------------------------------------------------------------------ detector


def test_ground_truth_is_read_back() -> None:
    for i, scene in enumerate(scenes("first", 200, seed=16)):
        found = detect(world.render(scene))
        assert not mistakes(scene, found), (i, scene)
        thing, truth = found.objects[0], world.tracks(scene)[0]
        assert np.abs(thing.centre - truth.centre).max() < 0.01
        assert np.abs(thing.radius / truth.radius - 1).max() < 0.1
        assert thing.shape_margin > 0.03
        if thing.motion == "falls":
            assert thing.gravity == pytest.approx(world.GRAVITY, rel=0.2)
            assert thing.bounces >= 1


def test_blurred_ground_truth_is_read_back() -> None:
    rng = np.random.default_rng(17)
    wrong = [s for s in scenes("first", 100, seed=18) if mistakes(s, detect(blurred(world.render(s), rng)))]
    assert len(wrong) <= 3, wrong


def test_the_full_world_is_read_back() -> None:
    wrong = 0
    for scene in scenes("full", 80, seed=19):
        found = detect(world.render(scene), n_objects=len(scene.objects))
        wrong += bool(mistakes(scene, found))
        if scene.relation:
            ordered = tuple(sorted(found.objects, key=lambda o: o.color != scene.objects[0].color))
            assert placed(replace(found, objects=ordered), scene.relation)
    assert wrong <= 1


@pytest.mark.parametrize(("width", "height", "frames"), [(96, 64, 25), (64, 96, 33), (128, 128, 17)])
def test_other_sizes_are_read_back(width: int, height: int, frames: int) -> None:
    for scene in scenes("first", 8, seed=20, width=width, height=height, frames=frames):
        assert not mistakes(scene, detect(world.render(scene))), scene


def test_a_single_frame_is_read_as_a_picture() -> None:
    for scene in scenes("first", 20, seed=21):
        found = detect(world.render(scene)[:1])
        thing = scene.objects[0]
        assert (found.shape, found.color, found.motion) == (thing.shape, thing.color, "unknown")
        assert found.background == scene.background


def test_a_clip_run_backwards_is_noticed() -> None:
    opposite = {
        "left": "right",
        "right": "left",
        "up": "down",
        "down": "up",
        "grows": "shrinks",
        "shrinks": "grows",
    }
    for scene in scenes("first", 60, seed=22):
        motion = scene.objects[0].motion
        found = detect(world.render(scene)[::-1])
        if motion in opposite:
            assert found.motion == opposite[motion]
        if motion == "falls":
            assert found.motion != "falls"


def test_swapped_colours_shuffled_frames_and_mirrors_are_noticed() -> None:
    moving = Object("star", "red", "medium", "solid", "right", 0.3, 0.5, dx=0.4, radius=0.19)
    clip = world.render(Scene((moving,), "navy", "plain"))
    assert not mistakes(Scene((moving,), "navy", "plain"), detect(clip))
    assert detect(clip[..., ::-1]).background != "navy"
    assert detect(clip[:, :, ::-1]).motion == "left"
    assert detect(clip[np.random.default_rng(23).permutation(len(clip))]).motion != "right"
    assert detect(np.repeat(clip[:1], len(clip), 0)).motion == "stays"


def test_an_empty_clip_has_no_object() -> None:
    clip = world.render(Scene((), "teal", "gradient", "vertical"))
    found = detect(clip)
    assert (found.background, found.background_style) == ("teal", "gradient")
    assert found.objects[0].seen == 0.0
    assert found.shape == found.motion == "unknown"
    with pytest.raises(ValueError, match="expected"):
        detect(clip[0])
