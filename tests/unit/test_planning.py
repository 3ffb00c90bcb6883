"""From what was asked to what will be run: defaults, limits, and every refusal's sentence. No torch, no model."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mutoscope import __version__
from mutoscope.errors import MediaError, RequestError
from mutoscope.manifest import Defaults, Limits, ModelFile, ModelFiles, ModelManifest, NamedLora
from mutoscope.media.write import VideoWriter, write_image
from mutoscope.planning import (
    MAX_PROMPT_CHARACTERS,
    SAMPLER_NAMES,
    describe,
    extension_frames,
    frames_for,
    keyframe_index,
    plan,
)
from mutoscope.request import BoxTrack, Conditioning, GenerationRequest, Keyframe, Outpaint

NOWHERE = ModelFile(path=Path("nowhere.gguf"))
DEFAULTS = Defaults(steps=20, guidance=3.0, shift=2.0, sampler="unipc", width=64, height=48, frames=17, fps=8.0,
                    negative_prompt="blurred")  # fmt: skip
MODEL = ModelManifest(
    name="test",
    files=ModelFiles(dit=NOWHERE, text_encoder=NOWHERE, vae=NOWHERE),
    defaults=DEFAULTS,
    sizes=((64, 48),),
    limits=Limits(max_frames=33, max_pixels=96 * 96),
)
STILL = np.zeros((8, 8, 3), np.uint8)


def frames(n: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.zeros((n, 8, 8, 3), np.uint8)


def planned(**options: Any) -> GenerationRequest:
    return plan(GenerationRequest(**{"prompt": "a ball", **options}), MODEL)


def conditioned(**options: Any) -> GenerationRequest:
    return planned(conditioning=Conditioning(**options))


# -- defaults ------------------------------------------------------------------------------------------------


def test_what_is_open_comes_from_the_model() -> None:
    r = planned()
    assert (r.width, r.height, r.frames, r.fps) == (64, 48, 17, 8.0)
    assert (r.steps, r.guidance, r.shift, r.sampler) == (20, 3.0, 2.0, "unipc")
    assert r.negative_prompt == "blurred"
    assert r.seed is not None
    assert r.guidance_kept is None, "nothing is given that could be kept"
    assert all(getattr(r, name) is not None for name in vars(r) if name != "guidance_kept")


def test_what_was_asked_stays() -> None:
    asked = {"width": 32, "height": 96, "frames": 5, "fps": 24.0, "steps": 7, "guidance": 1.0, "shift": 0.5,
             "sampler": "euler", "seed": 0, "negative_prompt": ""}  # fmt: skip
    r = planned(**asked)
    assert {name: getattr(r, name) for name in asked} == asked


def test_planning_twice_changes_nothing() -> None:
    once = planned(quality="draft")
    assert plan(once, MODEL) == once


def test_missing_seeds_differ() -> None:
    assert len({planned().seed for _ in range(8)}) > 1


@pytest.mark.parametrize(("usual", "draft"), [(50, 20), (20, 8), (8, 4), (2, 4)])
def test_a_draft_takes_fewer_steps(usual: int, draft: int) -> None:
    model = replace(MODEL, defaults=replace(DEFAULTS, steps=usual))
    assert plan(GenerationRequest(prompt="a", quality="draft"), model).steps == draft
    assert plan(GenerationRequest(prompt="a", quality="draft", steps=3), model).steps == 3


def test_distilled_models_take_four_steps_and_no_guidance() -> None:
    r = planned(sampler="distill4")
    assert (r.steps, r.guidance) == (4, 1.0)
    assert planned(sampler="distill4", guidance=2.0).guidance == 2.0

    assert (r.shift, planned(sampler="distill4", shift=3.0).shift) == (5.0, 3.0)
    distilled = replace(MODEL, defaults=replace(DEFAULTS, sampler="distill4", guidance=1.5, shift=7.0))
    r = plan(GenerationRequest(prompt="a"), distilled)
    assert (r.steps, r.guidance, r.shift) == (4, 1.5, 7.0)


def test_loras_have_a_strength_and_bring_their_own_sampling(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(b"x")
    own = NamedLora(
        file=ModelFile(path=file), strength=0.9, steps=4, sampler="distill4", guidance=1.0, shift=5.0
    )
    style = NamedLora(file=ModelFile(path=file))
    model = replace(MODEL, loras={"fast": own, "style": style})
    r = plan(GenerationRequest(prompt="a", loras=(("fast", None), (file, None), ("style", 0.5))), model)
    assert r.loras == (("fast", 0.9), (file, 1.0), ("style", 0.5))
    assert (r.steps, r.sampler, r.guidance, r.shift) == (4, "distill4", 1.0, 5.0)
    r = plan(GenerationRequest(prompt="a", loras=(("fast", 0.3),), shift=9.0), model)
    assert (r.shift, r.guidance, r.loras) == (9.0, 1.0, (("fast", 0.3),))
    r = plan(GenerationRequest(prompt="a", loras=(("style", None),)), model)
    assert (r.steps, r.sampler) == (20, "unipc")


@pytest.mark.parametrize(
    ("loras", "told"),
    [
        ((("nothing.safetensors", 1.0),), "no such file; test has fast"),
        ((("fats", 1.0),), "Did you mean fast"),
        (("fast",), "pairs of a file"),
        ((("fast", float("nan")),), "the strength of LoRA 'fast' = nan"),
        ((("fast", 1e9),), "expected -100 to 100"),
    ],
)
def test_loras_that_cannot_be(loras: Any, told: str) -> None:
    model = replace(MODEL, loras={"fast": NamedLora(file=NOWHERE)})
    with pytest.raises(RequestError, match=told):
        plan(GenerationRequest(prompt="a", loras=loras), model)


def test_the_samplers_are_those_of_the_engine() -> None:
    from mutoscope.engine import sampler

    for name in SAMPLER_NAMES:
        assert sampler.schedule(name, 4, 3.0)
    with pytest.raises(RequestError):
        sampler.schedule("other", 4, 3.0)


@pytest.mark.parametrize(
    ("seconds", "fps", "n"), [(0.01, 8, 1), (0.3, 8, 1), (0.5, 8, 5), (2, 8, 17), (5, 16, 81)]
)
def test_seconds_become_the_nearest_possible_frames(seconds: float, fps: float, n: int) -> None:
    assert frames_for(seconds, fps) == n


@pytest.mark.parametrize(("available", "n"), [(1, 1), (4, 1), (5, 5), (12, 9), (40, 17)])
def test_a_short_clip_shortens_the_video(available: int, n: int) -> None:
    assert conditioned(video=frames(available)).frames == n


# -- refusals ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"prompt": " \n"}, "empty"),
        ({"prompt": "x" * (MAX_PROMPT_CHARACTERS + 1)}, "20001 characters"),
        ({"width": 64}, "Only one of width and height"),
        ({"width": 64, "height": 50}, "The nearest is 64x48"),
        ({"width": 0, "height": 0}, "multiples of 16"),
        ({"width": -16, "height": 16}, "The nearest is 16x16"),
        ({"width": 1 << 20, "height": 16}, "at most 8192"),
        ({"width": 128, "height": 128}, "It was made for 64x48"),
        ({"frames": 0}, "4n+1"),
        ({"frames": -3}, "4n+1"),
        ({"frames": 16}, "Ask for 13 or 17"),
        ({"frames": 37}, "more than test can do (33)"),
        ({"fps": 0.0}, "fps = 0"),
        ({"fps": math.inf}, "fps = inf"),
        ({"steps": 0}, "1 to 1000"),
        ({"steps": 1001}, "1 to 1000"),
        ({"steps": 8, "sampler": "distill4"}, "exactly 4"),
        ({"guidance": -0.1}, "guidance"),
        ({"guidance": math.nan}, "guidance"),
        ({"shift": 0.0}, "shift"),
        ({"sampler": "dpm+"}, "Did you mean 'dpm++'?"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**63}, "seed"),
        ({"quality": "best"}, "quality"),
    ],
)
def test_what_cannot_be_run_is_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(RequestError) as failure:
        planned(**options)
    assert told in str(failure.value)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"keyframes": (Keyframe(image=STILL, index=17),)}, "Expected -17 to 16"),
        ({"keyframes": (Keyframe(image=STILL, index=-18),)}, "Expected -17 to 16"),
        ({"mask": STILL}, "without a source video"),
        ({"boxes": ((0, 0, 1, 1),)}, "without a source video"),
        ({"video": frames(17), "mask": STILL, "boxes": ((0, 0, 1, 1),)}, "Give one of them"),
        ({"video": frames(17), "boxes": ((0.5, 0, 0.5, 1),)}, "fractions of the frame"),
        ({"video": frames(17), "boxes": ((0, math.nan, 1, 1),)}, "fractions of the frame"),
        ({"outpaint": Outpaint(left=1)}, "needs a source video"),
        ({"video": frames(17), "outpaint": Outpaint()}, "at least one above 0"),
        ({"video": frames(17), "outpaint": Outpaint(left=-1, top=1)}, "0 to 4"),
        ({"video": frames(17), "outpaint": Outpaint(top=math.nan)}, "0 to 4"),
        ({"video": frames(17), "outpaint": Outpaint(top=1), "mask": STILL}, "makes its own mask"),
        ({"tracks": (BoxTrack(points=()),)}, "without points"),
        ({"tracks": (BoxTrack(points=((2, 0, 0, 1, 1),)),)}, "time"),
        ({"tracks": (BoxTrack(points=((0, 0, 0, 2, 1),)),)}, "fractions of the frame"),
        ({"tracks": (BoxTrack(points=((0, 0, 0, 1, 1),)),), "video": frames(17)}, "base picture"),
        ({"strength": -1.0}, "strength"),
        ({"strength": math.nan}, "strength"),
        ({"compose": Conditioning(mask=STILL)}, "without a source video"),
    ],
)
def test_conditioning_that_cannot_be_followed_is_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(RequestError) as failure:
        conditioned(**options)
    assert told in str(failure.value)


def test_a_clip_that_is_too_short_for_the_frames_asked_for() -> None:
    with pytest.raises(RequestError, match=r"has 12 frames, 17 are needed\. Ask for 9 frames or fewer"):
        planned(frames=17, conditioning=Conditioning(video=frames(12)))


def test_one_frame_cannot_extend_a_clip() -> None:
    with pytest.raises(RequestError, match="5 frames or more"):
        planned(frames=1, conditioning=Conditioning(extend_start=frames(3)))
    assert [extension_frames(n) for n in (5, 9, 81)] == [2, 4, 40]


def test_keyframes_count_from_both_ends() -> None:
    assert [keyframe_index(Keyframe(image=STILL, index=i), 5) for i in (0, 4, -1, -5)] == [0, 4, 4, 0]


@pytest.mark.parametrize("field", ["keyframes", "references", "video", "mask", "extend_start", "extend_end"])
def test_missing_and_wrong_files_are_found_by_their_headers(tmp_path: Path, field: str) -> None:
    text = tmp_path / "notes.png"
    text.write_text("not a picture")
    for path in (tmp_path / "gone.png", text):
        value: Any = (
            (Keyframe(image=path),) if field == "keyframes" else (path,) if field == "references" else path
        )
        more = {"video": frames(17)} if field == "mask" else {}
        with pytest.raises(MediaError, match=path.name):
            conditioned(**{field: value}, **more)


def test_a_video_is_no_picture_but_a_picture_is_a_clip(tmp_path: Path) -> None:
    clip, still = tmp_path / "clip.mp4", tmp_path / "still.png"
    write_image(still, STILL)
    with VideoWriter(clip, width=8, height=8, fps=8) as writer:
        for frame in frames(17):
            writer.write(frame)
    with pytest.raises(MediaError, match="a picture expected"):
        conditioned(keyframes=(Keyframe(image=clip),))
    assert conditioned(video=clip, mask=still, references=(still,)).frames == 17
    assert conditioned(video=still).frames == 1


# -- metadata ------------------------------------------------------------------------------------------------


def test_the_description_is_json_and_the_same_every_time() -> None:
    request = conditioned(video=frames(17), boxes=((0, 0, 1, 1),))
    info = describe(request, MODEL)
    assert json.loads(json.dumps(info)) == info
    assert info == describe(request, MODEL)
    assert (info["version"], info["model"], info["seed"]) == (__version__, "test", request.seed)
    assert info["request"]["conditioning"] == {"video": "array [17, 8, 8, 3]", "boxes": [[0, 0, 1, 1]]}


def test_planning_needs_no_torch() -> None:
    code = "import sys, mutoscope.planning; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
