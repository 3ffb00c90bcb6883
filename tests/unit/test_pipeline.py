"""The pipeline with a tiny random model: what happens, in which order, and what is left when it stops."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from mutoscope import Engine
from mutoscope.engine import latents, memory, pipeline, weights
from mutoscope.engine.linear import QuantLinear
from mutoscope.engine.models import Models
from mutoscope.engine.pipeline import build_request, decode, generate, write
from mutoscope.engine.text_cache import TextCache, name_of
from mutoscope.engine.umt5 import Layer, UMT5Encoder
from mutoscope.engine.vae import WanVAE
from mutoscope.engine.wan import WanModel
from mutoscope.errors import MediaError, RequestError, ResourceError, WeightError
from mutoscope.events import Event, Frames, Preview, Result, Stage, Step
from mutoscope.manifest import read_manifest
from mutoscope.media.read import probe, read_clip, read_image
from mutoscope.media.write import read_metadata
from mutoscope.request import Conditioning, GenerationRequest, Keyframe
from tests.tiny import make_tiny_model

PICTURE = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
REQUEST = GenerationRequest(prompt="a red ball falls", seed=1, frames=5, steps=2)
SHOWN = Conditioning(keyframes=(Keyframe(image=PICTURE),), references=(PICTURE, PICTURE))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def shared(tiny_model: Path) -> Models:
    return Models(read_manifest(tiny_model / "model.toml"))


@pytest.fixture
def models(shared: Models) -> Models:
    """The networks are opened once; what is changed on a copy ends with the test."""
    copy = Models(shared.manifest)
    copy.text, copy.dit, copy.vae = shared.text, shared.dit, shared.vae  # type: ignore[misc]
    return copy


def frames_of(events: Iterator[Event]) -> np.ndarray:
    return np.concatenate([e.frames for e in events if isinstance(e, Frames)])


def passes(
    monkeypatch: pytest.MonkeyPatch, models: Models, request: GenerationRequest
) -> list[tuple[int, bool]]:
    """(batch size, with side branch) of every pass through the transformer."""
    seen: list[tuple[int, bool]] = []
    forward = WanModel.forward

    def watched(self: WanModel, x: Any, time: Any, text: Any, rope: Any, vace: Any, strength: float) -> Any:
        seen.append((len(x), vace is not None))
        return forward(self, x, time, text, rope, vace, strength)

    with monkeypatch.context() as patch:
        patch.setattr(WanModel, "forward", watched)
        for _ in generate(models, request):
            pass
    return seen


# -- events --------------------------------------------------------------------------------------------------


def test_events_in_order(models: Models) -> None:
    events = list(generate(models, replace(REQUEST, steps=6, conditioning=SHOWN)))
    names = [e.name if isinstance(e, Stage) else type(e).__name__ for e in events]
    before, after = ["load", "text", "conditioning", "denoise"], ["decode", "Frames", "Frames", "Result"]
    assert names == [*before, *5 * ["Step"], "Preview", "Step", *after]
    assert [(e.i, e.n) for e in events if isinstance(e, Step)] == [(i, 6) for i in range(1, 7)]
    assert [(e.done, e.of, e.frames.shape) for e in events if isinstance(e, Frames)] == [
        (1, 5, (1, 32, 32, 3)),
        (5, 5, (4, 32, 32, 3)),
    ]
    times = [e.seconds for e in events if isinstance(e, (Stage, Result))]
    assert times == sorted(times)
    (preview,) = (e for e in events if isinstance(e, Preview))
    assert preview.frames.shape == (2, 4, 4, 3), "latent frames without those of the references"
    assert preview.frames.dtype == np.uint8


def test_the_result_says_all_that_is_needed_to_make_it_again(models: Models) -> None:
    result = list(generate(models, replace(REQUEST, seed=None)))[-1]
    assert isinstance(result, Result)
    assert result.info["model"] == "tiny"
    request = result.info["request"]
    assert result.info["seed"] == request["seed"] >= 0
    assert {
        "prompt",
        "width",
        "height",
        "frames",
        "fps",
        "steps",
        "guidance",
        "shift",
        "sampler",
    } <= request.keys()
    again = GenerationRequest(**{k: v for k, v in request.items() if k != "conditioning"})
    assert list(generate(models, again))[-1].info == result.info


def test_seconds_and_eta() -> None:
    """Steps of 1, 2 and 30 s, each followed by 100 s in which the caller does something."""
    ticks = iter([0, 10, 11, 111, 113, 213, 243, 300])
    clock = pipeline._Clock(lambda: next(ticks))
    reports = []
    for remaining in (2, 1, 0):
        clock.start_step()
        reports.append(clock.end_step(remaining))
    assert reports == [(1, 1 * 3), (2, 1.5 * 2), (30, 2 * 1)], (
        "median of the steps, and one step for decoding"
    )
    assert clock.seconds == 300


# -- the same, and not the same ------------------------------------------------------------------------------


def test_same_seed_same_bytes(models: Models, tiny_model: Path) -> None:
    first = frames_of(generate(models, REQUEST))
    fresh = Models(read_manifest(tiny_model / "model.toml"))
    assert np.array_equal(first, frames_of(generate(fresh, REQUEST)))
    assert not np.array_equal(first, frames_of(generate(models, replace(REQUEST, seed=2))))


@pytest.mark.parametrize(
    "change",
    [
        {"prompt": "a blue square moves left"},
        {"negative_prompt": "on a white background"},
        {"guidance": 5.0},
        {"steps": 3},
        {"shift": 1.0},
        {"sampler": "euler"},
        {"conditioning": SHOWN},
        {"conditioning": Conditioning(video=np.stack(5 * [PICTURE]))},
    ],
)
def test_every_option_has_an_effect(models: Models, change: dict[str, Any]) -> None:
    plain = frames_of(generate(models, replace(REQUEST, steps=2)))
    assert not np.array_equal(plain, frames_of(generate(models, replace(REQUEST, **change))))


def test_one_pass_per_step_without_guidance(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    assert passes(monkeypatch, models, replace(REQUEST, guidance=1.0)) == [(1, True)] * 2
    assert passes(monkeypatch, models, replace(REQUEST, guidance=2.0)) == [(2, True)] * 2
    monkeypatch.setattr(memory, "BATCHED_GUIDANCE_TOKENS", 3)
    assert passes(monkeypatch, models, replace(REQUEST, guidance=2.0)) == [(1, True)] * 4


def test_guidance_in_one_batch_or_two_passes(
    models: Models, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Prompts of different lengths, so that one of them is padded in the batch."""
    request = replace(REQUEST, prompt="a red ball falls and bounces", negative_prompt="", conditioning=SHOWN)
    results = []
    for limit in (10**6, 0):
        monkeypatch.setattr(memory, "BATCHED_GUIDANCE_TOKENS", limit)
        list(generate(models, request, keep_latents=tmp_path / "x"))
        results.append(latents.load(tmp_path / "x")[0])
    # 3 times the measured 1.2e-6
    assert (results[0] - results[1]).norm() / results[0].norm() < 4e-6
    monkeypatch.setattr(pipeline.sampler, "guide", lambda cond, uncond, scale: cond)
    list(generate(models, request, keep_latents=tmp_path / "x"))
    assert (results[0] - latents.load(tmp_path / "x")[0]).norm() / results[0].norm() > 1e-3


def test_strength_zero_is_the_prompt_alone(
    models: Models, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    given = replace(SHOWN, references=(), strength=0.0)
    assert passes(monkeypatch, models, replace(REQUEST, conditioning=given)) == [(2, False)] * 2
    followed = frames_of(generate(models, replace(REQUEST, conditioning=replace(given, strength=1.0))))
    ignored = frames_of(generate(models, replace(REQUEST, conditioning=given)))
    text = frames_of(generate(models, replace(REQUEST, conditioning=Conditioning(strength=0.0))))
    assert np.array_equal(ignored, text)
    assert not np.array_equal(ignored, followed)
    forward = WanModel.forward

    def without_hints(
        self: WanModel, x: Any, time: Any, text: Any, rope: Any, vace: Any, strength: float
    ) -> Any:
        return forward(self, x, time, text, rope, None)

    monkeypatch.setattr(WanModel, "forward", without_hints)
    same = frames_of(generate(models, replace(REQUEST, conditioning=replace(given, strength=1.0))))
    assert np.array_equal(ignored, same)


def test_text_is_encoded_once(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = encoded(monkeypatch)
    for seed in (1, 2):
        list(generate(models, replace(REQUEST, seed=seed)))
    assert len(calls) == 2, "the prompt and the negative prompt"
    list(generate(models, replace(REQUEST, prompt="  a red\nball falls ")))
    assert len(calls) == 2, "the cleaned text counts"
    list(generate(models, replace(REQUEST, prompt="a blue square")))
    assert len(calls) == 3
    for n in range(20):
        models.text_rows([f"prompt {n}"])
    assert len(models._rows) == 8, "not without bound"


def test_prompts_encoded_together_are_as_encoded_alone(models: Models) -> None:
    encoder, tokenizer = models.text
    ids = [torch.tensor([tokenizer.encode(text)]) for text in ("a red ball falls", "", "a blue star " * 20)]
    with torch.inference_mode():
        alone = [encoder(i) for i in ids]
        assert all(map(torch.equal, encoder.together(ids), alone))
        assert all(map(torch.equal, encoder.together(ids[::-1]), alone[::-1]))


@pytest.fixture
def cached(models: Models, tmp_path: Path) -> Callable[[], Models]:
    """Models with a negative prompt of their own and a text cache, as a new process would have them."""
    defaults = replace(models.manifest.defaults, negative_prompt="blurred  pictures")

    def again() -> Models:
        copy = Models(replace(models.manifest, defaults=defaults), text_cache=TextCache(tmp_path / "cache"))
        copy.text, copy.dit, copy.vae = models.text, models.dit, models.vae  # type: ignore[misc]
        return copy

    return again


def test_the_models_own_negative_prompt_is_kept_on_disk(
    cached: Callable[[], Models], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls = encoded(monkeypatch)
    first = frames_of(generate(cached(), REQUEST))
    assert len(calls) == 2
    (file,) = (tmp_path / "cache").iterdir()
    calls.clear()
    assert np.array_equal(frames_of(generate(cached(), REQUEST)), first), "the same bytes"
    assert len(calls) == 1, "the prompt, which a user wrote, is not kept"
    for damage in (b"", file.read_bytes()[:-1], b"x" * 200):
        file.write_bytes(damage)
        calls.clear()
        assert np.array_equal(frames_of(generate(cached(), REQUEST)), first)
        assert len(calls) == 2
    calls.clear()
    list(generate(cached(), replace(REQUEST, negative_prompt="grey")))
    assert len(calls) == 2
    assert list((tmp_path / "cache").iterdir()) == [file], "nor another negative prompt"


def test_rows_on_disk_are_those_of_one_file_and_one_way(tmp_path: Path) -> None:
    path = tmp_path / "encoder.gguf"
    path.write_bytes(b"1")
    names = {
        name_of(path, "a", dtype="bf16"),
        name_of(path, "b", dtype="bf16"),
        name_of(path, "a", dtype="f32"),
    }
    assert name_of(path, "a", dtype="bf16") in names
    os.utime(path, (1, 1))
    names.add(name_of(path, "a", dtype="bf16"))
    assert len(names) == 4


def test_the_text_cache_is_bounded(tmp_path: Path) -> None:
    cache = TextCache(tmp_path, max_bytes=3000)
    rows = torch.ones(1, 10, 16)
    for n, name in enumerate("abcde"):
        cache.write(name, rows * n)
        os.utime(tmp_path / f"{name}.npy", (n + 1, n + 1))
        assert cache.read("a") is not None, "used every time, so never the oldest"
    assert sorted(p.stem for p in tmp_path.iterdir()) == ["a", "d", "e"]
    assert cache.read("b") is None
    unwritable = TextCache(tmp_path / "a.npy" / "folder")
    unwritable.write("a", rows)
    assert unwritable.read("a") is None


def test_text_is_encoded_while_models_are_opened(shared: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = encoded(monkeypatch)
    names = []
    forward = UMT5Encoder.together
    monkeypatch.setattr(
        UMT5Encoder, "together", lambda *a: names.append(threading.current_thread().name) or forward(*a)
    )
    stages = [e.name for e in generate(Models(shared.manifest), REQUEST) if isinstance(e, Stage)]
    assert stages[:2] == ["load", "text"]
    assert len(calls) == 2
    assert names[0] != threading.main_thread().name
    assert len(names) == 1


def test_what_stops_the_opening_stops_the_encoder(shared: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    """The encoder waits in its first layer until the opening fails; then it stops before one of the next."""
    opened, layers = threading.Event(), []
    before = set(threading.enumerate())
    forward, load = Layer.forward, weights.load_umt5

    def waiting(self: Layer, *args: Any) -> Any:
        layers.append(self)
        assert opened.wait(30)
        return forward(self, *args)

    def of_four_layers(*args: Any, **options: Any) -> Any:
        encoder, metadata = load(*args, **options)
        encoder.enc.blk = torch.nn.ModuleList([encoder.enc.blk[0]] * 4)
        return encoder, metadata

    def damaged(*args: Any, **options: Any) -> None:
        raise WeightError("damaged")

    class Failed(threading.Event):
        def set(self) -> None:
            super().set()
            opened.set()

    monkeypatch.setattr(Layer, "forward", waiting)
    monkeypatch.setattr(weights, "load_umt5", of_four_layers)
    monkeypatch.setattr(weights, "load_wan", damaged)
    monkeypatch.setattr(pipeline, "threading", SimpleNamespace(Event=Failed))
    with pytest.raises(WeightError, match="damaged"):
        list(generate(Models(shared.manifest), REQUEST))
    assert len(layers) <= 1
    assert set(threading.enumerate()) <= before


def encoded(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The ids of every text that the encoder is given, as it is given them."""
    calls: list[torch.Tensor] = []
    together = UMT5Encoder.together

    def counted(self: UMT5Encoder, ids: list[torch.Tensor], *rest: Any) -> list[torch.Tensor]:
        calls.extend(ids)
        return together(self, ids, *rest)

    monkeypatch.setattr(UMT5Encoder, "together", counted)
    return calls


# -- before work ---------------------------------------------------------------------------------------------


def test_a_wrong_request_opens_no_model(models: Models, tmp_path: Path) -> None:
    class Unopened(Models):
        text = dit = vae = property(lambda self: pytest.fail("a model was opened"))  # type: ignore[assignment]

    wrong = [
        {"frames": 6},
        {"width": 40, "height": 32},
        {"steps": 0},
        {"conditioning": Conditioning(mask=PICTURE)},
        {"conditioning": Conditioning(references=(str(tmp_path / "none.png"),))},
        {"conditioning": Conditioning(keyframes=(Keyframe(image=PICTURE.astype(np.float32)),))},
    ]
    for change in wrong:
        with pytest.raises((RequestError, MediaError)):
            next(generate(Unopened(models.manifest), replace(REQUEST, **change)))  # type: ignore[arg-type]


def test_a_model_without_vace_refuses_what_it_cannot_follow(tmp_path: Path) -> None:
    engine = Engine(make_tiny_model(tmp_path, vace=False))
    assert engine.generate("a red ball", seed=1, steps=1).frames.shape == (5, 32, 32, 3)
    assert engine.generate("a red ball", seed=1, steps=1, strength=0.5).frames.shape == (5, 32, 32, 3)
    for given in (
        {"keyframes": (Keyframe(image=PICTURE),)},
        {"video": np.stack(5 * [PICTURE])},
        {"references": (PICTURE,)},
        {"compose": Conditioning(video=np.stack(5 * [PICTURE]))},
    ):
        events = engine.events(build_request("a red ball", **given))
        with pytest.raises(RequestError, match=r"tiny follows text only.*Choose a VACE model"):
            list(itertools.islice(events, 2))


def test_too_little_memory_is_said_before_work(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "available", lambda device: 1000)
    events = generate(models, REQUEST)
    assert next(events) == Stage(name="load", seconds=pytest.approx(0, abs=60))
    with pytest.raises(ResourceError, match="32x32 with 5 frames"):
        next(events)


def test_unknown_options_are_refused() -> None:
    with pytest.raises(TypeError, match=r"'keyframe'.*keyframes"):
        build_request("x", keyframe=())
    with pytest.raises(TypeError, match=r"'wdith'.*width"):
        build_request("x", wdith=32)
    with pytest.raises(TypeError, match="both conditioning= and references="):
        build_request("x", conditioning=Conditioning(), references=(PICTURE,))
    request = build_request("x", seed=3, references=(PICTURE,), strength=0.5)
    assert request.seed == 3
    assert request.conditioning.references[0] is PICTURE
    assert request.conditioning.strength == 0.5


# -- latents -------------------------------------------------------------------------------------------------


def test_latents_decode_to_the_frames_of_the_run(models: Models, tmp_path: Path) -> None:
    path = tmp_path / "new" / "x.safetensors"
    events = list(generate(models, replace(REQUEST, conditioning=SHOWN), keep_latents=path))
    kept, info = latents.load(path)
    assert kept.shape == (1, 4, 2, 4, 4), "references are not part of the video"
    assert np.array_equal(frames_of(decode(models.vae, kept)), frames_of(iter(events)))
    assert info["steps_done"] == 2
    assert {k: v for k, v in info.items() if k != "steps_done"} == events[-1].info
    assert events[-1].latents == path


def test_closing_between_steps_keeps_the_latest_guess(models: Models, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    request = replace(REQUEST, steps=6, conditioning=SHOWN)
    preview = next(e for e in generate(models, request) if isinstance(e, Preview))
    events = generate(models, request, keep_latents=path)
    for event in events:
        if isinstance(event, Step) and event.i == 5:
            break
    assert not path.exists()
    events.close()  # type: ignore[attr-defined]
    kept, info = latents.load(path)
    assert info["steps_done"] == 5
    assert kept.shape == (1, 4, 2, 4, 4)
    assert np.array_equal(latents.preview(kept, models.vae.config.rgb), preview.frames)
    assert frames_of(decode(models.vae, kept)).shape == (5, 32, 32, 3)


def test_closing_before_the_first_step_leaves_nothing(models: Models, tmp_path: Path) -> None:
    for stop in range(1, 5):
        events = generate(models, REQUEST, keep_latents=tmp_path / "x")
        list(itertools.islice(events, stop))
        events.close()  # type: ignore[attr-defined]
    assert list(tmp_path.iterdir()) == []


class Broken(Exception):
    pass


def break_decoding(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    """One frame comes, then it fails."""
    whole = models.vae.decode_stream

    def some(*args: Any) -> Iterator[torch.Tensor]:
        yield next(iter(whole(*args)))
        raise Broken

    monkeypatch.setattr(models.vae, "decode_stream", some)


def test_a_failed_decode_costs_no_denoising(
    models: Models, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "x.safetensors"
    with monkeypatch.context() as patch:
        break_decoding(models, patch)
        with pytest.raises(Broken):
            list(generate(models, REQUEST, keep_latents=path))
    assert np.array_equal(
        frames_of(decode(models.vae, latents.load(path)[0])), frames_of(generate(models, REQUEST))
    )


def test_a_failure_in_a_step_keeps_the_steps_before(
    models: Models, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    forward, left = WanModel.forward, [1, 1]

    def failing(*args: Any) -> Any:
        if not left:
            raise Broken
        left.pop()
        return forward(*args)

    monkeypatch.setattr(WanModel, "forward", failing)
    with pytest.raises(Broken):
        list(generate(models, replace(REQUEST, steps=4), keep_latents=tmp_path / "x"))
    assert latents.load(tmp_path / "x")[1]["steps_done"] == 2


def test_nothing_is_kept_unasked(models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert list(generate(models, REQUEST))[-1].latents is None
    assert list(tmp_path.iterdir()) == []


def test_large_pictures_are_decoded_in_tiles(models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    z = torch.randn(1, 4, 2, 6, 4, generator=torch.Generator().manual_seed(0))
    whole = frames_of(decode(models.vae, z))
    used: list[int] = []

    def tiled(vae: WanVAE, z: torch.Tensor) -> Iterator[torch.Tensor]:
        used.append(1)
        return vae.decode_stream(z)

    monkeypatch.setattr(pipeline.tiling, "TILE_PX", 47)
    monkeypatch.setattr(pipeline.tiling, "decode_tiled", tiled)
    assert np.array_equal(frames_of(decode(models.vae, z)), whole)
    assert used == [1]


# -- files ---------------------------------------------------------------------------------------------------


def written(models: Models, path: Path) -> Iterator[Event]:
    events = generate(models, REQUEST)
    return write(events, path, fps=8, width=32, height=32, info={"model": "tiny", "seed": 1})


def test_write_passes_events_on_and_embeds_what_made_it(models: Models, tmp_path: Path) -> None:
    path = tmp_path / "x.mp4"
    seen = []
    for event in written(models, path):
        seen.append(type(event))
        assert path.exists() == isinstance(event, Result), "complete before the result is told"
    assert seen == [type(e) for e in generate(models, REQUEST)]
    assert probe(path).frames == 5
    assert read_metadata(path) == {"model": "tiny", "seed": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_written_is_what_was_made(models: Models, tmp_path: Path) -> None:
    events = list(written(models, tmp_path / "frames"))
    files = sorted((tmp_path / "frames").iterdir())
    assert np.array_equal(np.stack([read_image(f) for f in files]), frames_of(iter(events)))


def test_a_failed_decode_leaves_no_file(
    models: Models, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    break_decoding(models, monkeypatch)
    with pytest.raises(Broken):
        list(written(models, tmp_path / "x.mp4"))
    assert list(tmp_path.iterdir()) == []


def test_a_stop_while_writing_leaves_the_old_file(models: Models, tmp_path: Path) -> None:
    path = tmp_path / "x.mp4"
    path.write_text("old")
    events = written(models, path)
    next(e for e in events if isinstance(e, Frames) and e.done == e.of)
    events.close()  # type: ignore[attr-defined]
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_conditioning_is_dumped(models: Models, tmp_path: Path) -> None:
    list(generate(models, replace(REQUEST, conditioning=SHOWN), dump_conditioning=tmp_path / "dump"))
    first = read_image(min((tmp_path / "dump" / "frames").iterdir()))
    assert np.array_equal(first, PICTURE)
    names = sorted(p.name for p in (tmp_path / "dump").iterdir())
    assert names == ["frames", "mask", "reference-1.png", "reference-2.png"]


# -- the library ---------------------------------------------------------------------------------------------


def test_engine(tiny_model: Path, models: Models, tmp_path: Path) -> None:
    engine = Engine(tiny_model, device="cpu")
    video = engine.generate("a red ball falls", seed=1, frames=5, steps=2)
    assert np.array_equal(video.frames, frames_of(generate(models, REQUEST)))
    assert video.fps == 8
    path = video.save(tmp_path / "x.gif")
    assert read_metadata(path) == video.info
    assert len(read_clip(path, max_frames=99).frames) == 5
    planned = engine.plan(GenerationRequest(prompt="x"))
    assert (planned.width, planned.height, planned.frames, planned.steps, planned.guidance) == (
        32,
        32,
        5,
        4,
        2.0,
    )
    assert planned.seed is not None
    assert engine.plan(planned) == planned


def test_what_was_kept_for_one_clip_serves_the_next(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory in use for converted weights is not counted as missing, though it is free no more."""
    models = Models(read_manifest(tiny_model / "model.toml"))
    rooms = []
    monkeypatch.setattr("mutoscope.engine.models.settle", lambda model, room: rooms.append(room) or 0)
    monkeypatch.setattr("mutoscope.engine.memory.available", lambda device: 10_000)
    need = memory.Need(memory.RUNTIME_BYTES + 1000, memory.RUNTIME_BYTES)
    models.settle(need, need.denoise)
    next(m for m in models.dit.modules() if isinstance(m, QuantLinear)).precision.kept_bytes = 500
    models.settle(need, need.denoise)
    assert rooms == [7000, 7500]
    promised = Models(models.manifest, memory_bytes=memory.RUNTIME_BYTES + 3000)
    promised.settle(need, need.denoise)
    assert rooms[-1] == 2000
