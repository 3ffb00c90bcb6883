"""What is asked for is what is seen: the built-in model, through its shipped files and the engine's own pipeline.

Seeds are fixed, so a clip differs between machines only by rounding. Every bound leaves a wide margin to what
docs/starter.md reports (shares of 0.9 and more are asked for as 6 of 8), and chance is far below it.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from mutoscope import Engine
from mutoscope.media.frames import psnr
from mutoscope.request import Keyframe
from training import evaluate
from training.detect import detect
from training.questions import ROWS, Question, Seen, questions


@pytest.fixture(scope="module")
def engine() -> Engine:
    torch.set_num_threads(1)
    return Engine("pocket")


@pytest.fixture(scope="module")
def answered(engine: Engine) -> list[tuple[Question, Seen]]:
    """Nine held-out prompts of the simple world, one of each motion, with their clips."""
    asked = questions("plain", 9)
    return [(q, Seen.of(q, evaluate.answer(engine, q))) for q in asked]


def test_the_clip_is_what_was_ordered(answered: list[tuple[Question, Seen]]) -> None:
    for question, seen in answered:
        scene = question.scene
        assert seen.clip.dtype == np.uint8
        assert seen.clip.shape == (scene.frames, scene.height, scene.width, 3)


@pytest.mark.parametrize(
    "row", ["simple prompts: colour", "simple prompts: background", "simple prompts: shape"]
)
def test_what_is_asked_for_is_seen(answered: list[tuple[Question, Seen]], row: str) -> None:
    missed = [q.prompt for q, seen in answered if not ROWS[row].judge(q, seen)]
    assert len(missed) <= 3, f"{row}: {len(missed)} of 9 missed: {missed}"


def test_words_matter_more_than_noise(engine: Engine) -> None:
    """The same seed with another colour word gives that colour; with another direction, the other way."""
    for color in ("red", "blue", "yellow", "green"):
        clip = engine.generate(f"a large {color} square stays still on a black background", seed=3).frames
        assert detect(clip).color == color


def test_left_and_right_are_opposite(engine: Engine) -> None:
    """Mean horizontal motion over four seeds, in frame widths: chance is 0, the world's is .35 to .55."""
    travelled = {}
    for way in ("left", "right"):
        prompt = f"a large red ball moves to the {way} on a gray background"
        clips = [engine.generate(prompt, seed=seed).frames for seed in range(4)]
        travelled[way] = np.mean([detect(clip).objects[0].direction[0] for clip in clips])
    assert travelled["left"] < -0.15 < 0.15 < travelled["right"]


def test_the_first_frame_is_kept(engine: Engine) -> None:
    quality = []
    *asked, other = questions("plain", 5)
    for question in asked:
        image = question.truth[0]
        shown = {"keyframes": (Keyframe(image=image, index=0),)}
        clip = evaluate.answer(engine, replace(question, shown=shown))
        quality.append(psnr(clip[0], image))
        assert psnr(clip[0], other.truth[0]) < psnr(clip[0], image), "another picture fits better"
    assert np.median(quality) >= 20.0, quality


def test_a_keyframe_at_the_end_is_reached(engine: Engine) -> None:
    """Closer to the given last frame than the same clip without it, by half and more of its error."""
    gains = []
    for question in questions("plain", 4):
        image = question.truth[-1]
        shown = {"keyframes": (Keyframe(image=image, index=-1),)}
        free = evaluate.answer(engine, question)
        clip = evaluate.answer(engine, replace(question, shown=shown))
        gains.append(psnr(clip[-1], image) - psnr(free[-1], image))
    assert np.median(gains) > 3.0, gains


def test_what_falls_bounces(engine: Engine) -> None:
    """Of 15 classes of motion, so chance is small; the rest of the table is in docs/starter.md."""
    asked = [q for q in questions("plain") if q.scene.objects[0].motion == "falls"]
    missed = [
        q.prompt for q in asked if not ROWS["motion: falls"].judge(q, Seen.of(q, evaluate.answer(engine, q)))
    ]
    assert len(asked) == 5
    assert len(missed) <= 2, missed


def test_other_sizes_and_lengths_are_followed(engine: Engine) -> None:
    """One prompt for each, wide, tall and long: colours are right by chance once in nine."""
    asked = questions("forms", 7)
    missed = []
    for question in asked:
        clip = evaluate.answer(engine, question)
        assert clip.shape == question.truth.shape
        if not ROWS["other sizes and lengths: colour"].judge(question, Seen.of(question, clip)):
            missed.append(question.prompt)
    assert len(missed) <= 3, missed


def test_a_box_is_repainted_and_the_rest_kept(engine: Engine) -> None:
    asked, missed = questions("repaint", 4), []
    for question in asked:
        seen = Seen.of(question, evaluate.answer(engine, question))
        outside = ~question.inside
        assert question.source is not None
        kept = psnr(seen.clip[:, outside], question.source[:, outside])
        changed = psnr(seen.clip[:, question.inside], question.source[:, question.inside])
        assert kept > changed + 3.0, question.prompt
        if seen.found.color != question.scene.objects[0].color:
            missed.append(question.prompt)
    assert len(missed) <= 2, missed


def test_seeds(engine: Engine) -> None:
    prompt = "a pink star grows on a teal background"
    first, again, other = (engine.generate(prompt, seed=seed).frames for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert psnr(first, other) < 30.0


def test_guidance_one_is_one_pass_and_still_a_clip(engine: Engine) -> None:
    clip = engine.generate("a red square on a gray background", seed=1, guidance=1.0, steps=6).frames
    assert clip.std() > 5.0
