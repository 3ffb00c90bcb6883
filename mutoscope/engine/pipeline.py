"""From a request to frames. `generate` is the page to read; all else here serves it.

    engine = Engine("pocket")
    engine.generate("a red ball falls and bounces").save("ball.mp4")

    for event in engine.events(GenerationRequest(prompt="...")):    # the same, step by step
        ...

The caller drives: between two events nothing runs, so stopping is closing the generator.
"""

from __future__ import annotations

import math
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mutoscope.catalog import find_model
from mutoscope.engine import cache, conditioning, devices, latents, lora, memory, pages, sampler, tiling
from mutoscope.engine.models import Models
from mutoscope.engine.precision import REPACKED
from mutoscope.engine.text_cache import default_text_cache
from mutoscope.engine.vae import SPATIAL_STRIDE, TEMPORAL_STRIDE, WanVAE
from mutoscope.engine.wan import TextContext, rope_table
from mutoscope.errors import OutputError, RequestError
from mutoscope.events import Event, Frames, Preview, Result, Stage, Step
from mutoscope.manifest import suggest
from mutoscope.media.write import VideoWriter
from mutoscope.planning import describe, plan, size_bytes
from mutoscope.request import Conditioning, FramesHWC, GenerationRequest

PREVIEW_STEPS = 5


@devices.tells_out_of_memory
@torch.inference_mode()
def generate(
    models: Models,
    request: GenerationRequest,
    *,
    keep_latents: Path | None = None,
    dump_conditioning: Path | None = None,
    step_cache: cache.StepCache | None = None,
) -> Iterator[Event]:
    """Make one video: yields stages, steps, previews, finished frames, and the result.

    keep_latents: a file for the latents, written before decoding; when the generator is closed or fails in the middle
    of denoising, it holds the latest guess of the finished ones.
    dump_conditioning: a folder for what the model is shown.
    step_cache: in the place of the one that the request names.

    Raises:
        RequestError, MediaError: before any work. ResourceError: if memory cannot suffice. OutputError: not a number.
    """
    clock = _Clock()
    request = plan(request, models.manifest)
    info = describe(request, models.manifest, models.precision)

    yield Stage(name="load", seconds=clock.seconds)
    with _text_meanwhile(models, request):
        loras = models.open_loras(request)
        need = _check_models(models, request, loras)

    yield Stage(name="text", seconds=clock.seconds)
    text = _text_context(models, request, loras)

    yield Stage(name="conditioning", seconds=clock.seconds)
    if models.stream is not None:
        models.settle(need, need.encode)
    vace, guidance = _followed(models, request, loras, dump_conditioning)

    models.settle(need, need.denoise)
    yield Stage(name="denoise", seconds=clock.seconds)
    n_references = request.conditioning.n_references
    shape = latents.shape(models.dit.config.out_dim, request, n_references)
    sigmas = sampler.schedule(request.sampler, request.steps, request.shift)
    velocity = _velocity(models, request, loras, text, vace, guidance, shape, sigmas, step_cache)
    solver = sampler.make_solver(request.sampler, sigmas)
    x, state = sampler.noise(shape, request.seed).to(models.device), solver.start()
    done, latest = 0, x
    try:
        for i in range(request.steps):
            clock.start_step()
            v = velocity(x, i)
            clean = x - sigmas[i] * v
            x, state = solver.step(x, v, i, state)
            done, latest = i + 1, clean[:, :, n_references:]
            seconds, eta = clock.end_step(request.steps - done)
            yield Step(i=done, n=request.steps, seconds=seconds, eta_seconds=eta)
            if done % PREVIEW_STEPS == 0 and done < request.steps:
                yield Preview(frames=latents.preview(latest, models.vae_config.rgb))
    finally:
        models.without_loras()
        if done == request.steps:
            latest = x[:, :, n_references:]
        if keep_latents is not None and done:
            latents.save(keep_latents, latest, {**info, "steps_done": done})

    if not torch.isfinite(latest).all():
        raise OutputError(
            "The latents are not numbers any more.", hint="Try another seed, sampler or guidance."
        )
    del text, vace, velocity  # large, and decoding needs the memory
    models.settle(need, need.decode)
    yield Stage(name="decode", seconds=clock.seconds)
    yield from decode(models.vae, latest)
    pages.give_back()
    yield Result(seconds=clock.seconds, info=info, latents=keep_latents)


@torch.inference_mode()
def decode(vae: WanVAE, latents_BZFHW: Tensor) -> Iterator[Frames]:
    """Latents to frames as they come, in tiles if the picture is larger than one."""
    total = 1 + (latents_BZFHW.shape[2] - 1) * TEMPORAL_STRIDE
    large = max(latents_BZFHW.shape[3:]) * SPATIAL_STRIDE > tiling.TILE_PX
    chunks = tiling.decode_tiled(vae, latents_BZFHW) if large else vae.decode_stream(latents_BZFHW)
    done = 0
    for chunk in chunks:
        pixels = (
            chunk[0].permute(1, 2, 3, 0).add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8).cpu().numpy()
        )
        done += len(pixels)
        yield Frames(frames=pixels, done=done, of=total)


def write(
    events: Iterator[Event], path: Path, *, fps: float, width: int, height: int, info: Mapping[str, Any]
) -> Iterator[Event]:
    """Pass events on, writing their frames to `path`, which appears complete, before the result, or not at all.

    `info` is embedded (see `planning.describe`). The writer is opened for the first frame, so a failure before
    leaves no trace.
    """
    writer: VideoWriter | None = None
    try:
        for event in events:
            if isinstance(event, Frames):
                if writer is None:
                    writer = VideoWriter(path, width=width, height=height, fps=fps, metadata=info)
                for frame in event.frames:
                    writer.write(frame)
            if isinstance(event, Result) and writer is not None:
                writer.close()
            yield event
    finally:
        if writer is not None:
            writer.abort()  # does nothing once closed


def _check_models(models: Models, request: GenerationRequest, loras: lora.Loras) -> memory.Need:
    """Opens the transformer, looks at the VAE, and checks what only they can tell."""
    config = models.dit.config
    if not config.vace_layers and not request.conditioning.is_empty:
        raise RequestError(
            f"{models.manifest.name} follows text only, but the request has pictures, clips, masks or tracks.",
            hint="Choose a VACE model.",
        )
    numbers = models.numbers(request)
    more = sum(changes.nbytes(models.dtype.itemsize) for changes, _ in loras)
    if numbers is not None:
        more += cache.kept_bytes(config, request)
    return memory.check(
        config,
        request,
        models.device,
        vae_base_dim=models.vae_config.base_dim,
        itemsize=models.dtype.itemsize,
        promised=models.memory_bytes,
        resident=models.resident_bytes + more,
    )


def _prompts(request: GenerationRequest) -> list[str]:
    """The prompt and, with guidance, the negative prompt."""
    negative = [request.negative_prompt or ""] if request.guidance != 1.0 else []
    return [request.prompt, *negative]


@contextmanager
def _text_meanwhile(models: Models, request: GenerationRequest) -> Iterator[None]:
    """Encode the prompts in a thread while the block opens the other networks, which is mostly one core's work.

    The thread has ended when the block has; an error of the block stops it early.
    """
    if "dit" in models.__dict__ or models.device.type != "cpu" or models.precision in REPACKED:
        yield  # packing anew keeps all cores busy, with torch's threads changed meanwhile
        return
    failed = threading.Event()

    def go_on() -> None:
        if failed.is_set():
            raise _Stopped

    with ThreadPoolExecutor(1) as thread:
        rows = thread.submit(models.text_rows, _prompts(request), go_on)
        try:
            yield
        except BaseException:
            failed.set()
            raise
        rows.result()


class _Stopped(Exception):
    """The work of a thread is not needed any more."""


def _text_context(models: Models, request: GenerationRequest, loras: lora.Loras) -> TextContext:
    """Keys and values of the prompt and, with guidance, of the negative prompt: a batch of one or two."""
    rows = models.text_rows(_prompts(request))
    lengths = [r.shape[1] for r in rows]
    padded = torch.cat([torch.nn.functional.pad(r, (0, 0, 0, max(lengths) - r.shape[1])) for r in rows])
    return models.dit_with(loras).text_context(padded, lengths)


def _followed(
    models: Models, request: GenerationRequest, loras: lora.Loras, dump: Path | None
) -> tuple[Tensor | None, float | Tensor]:
    """The side input of the VACE branch, and the guidance scale.

    With `guidance_kept` there is a scale for each latent cell, [1, 1, F', H/8, W/8]: that one where something is given.
    """
    shown = conditioning.prepare(
        request.conditioning, request.width, request.height, request.frames, request.fps
    )
    if dump is not None:
        conditioning.dump(shown, dump, request.fps)
    vace, scale, kept = _vace_tokens(models, request, loras, shown), request.guidance, request.guidance_kept
    if vace is None or kept is None:
        return vace, scale
    return vace, kept + (scale - kept) * conditioning.generated(shown).to(models.device)


def _vace_tokens(
    models: Models, request: GenerationRequest, loras: lora.Loras, shown: conditioning.Prepared
) -> Tensor | None:
    """The side input of the VACE branch; None where there is no branch, or its strength is zero."""
    if not models.dit.config.vace_layers or request.conditioning.strength == 0:
        return None

    def encode(chunks: Iterator[Tensor]) -> Iterator[Tensor]:
        large = max(request.width, request.height) > tiling.TILE_PX
        return tiling.encode_tiled(models.vae, chunks) if large else models.vae.encode_stream(chunks)

    return models.dit_with(loras).vace_tokens(conditioning.vace_context(shown, encode, models.device))


def _velocity(
    models: Models,
    request: GenerationRequest,
    loras: lora.Loras,
    text: TextContext,
    vace: Tensor | None,
    guidance: float | Tensor,
    shape: Sequence[int],
    sigmas: Sequence[float],
    step_cache: cache.StepCache | None = None,
) -> Callable[[Tensor, int], Tensor]:
    """The guided velocity at step i. All that does not depend on x is made here, once."""
    device = text.keys[0].device
    grid = (shape[2], shape[3] // 2, shape[4] // 2)
    dit = models.dit_with(loras)
    rope = rope_table(grid, dit.config.head_dim, device=device)
    timesteps = [sampler.timestep(request.sampler, sigma) for sigma in sigmas[:-1]]
    modulation = dit.time_modulation(torch.tensor(timesteps, device=device))
    steps = step_cache or cache.make_cache(request.cache, request.steps, models.numbers(request), modulation)
    kind, _, zero = request.guidance_kind.partition("=")
    guide = sampler.guide_zero_star if kind == "zero-star" else sampler.guide
    batched = math.prod(grid) <= memory.BATCHED_GUIDANCE_TOKENS

    def run(x: Tensor, i: int, branches: cache.Branches, around: cache.Around | None) -> list[Tensor]:
        if len(branches) > 1 and not batched:
            return [v for branch in branches for v in run(x, i, (branch,), around)]
        context = text.slice(branches[0], branches[-1] + 1)
        n = len(branches)
        side = vace.expand(n, -1, -1) if vace is not None else None
        options = {} if around is None else {"around": partial(around, branches)}
        model = models.dit_with(loras)  # another request may have been served between two steps
        strength = request.conditioning.strength
        v = model(x.expand(n, -1, -1, -1, -1), modulation.at(i), context, rope, side, strength, **options)
        return list(v.split(1))

    def velocity(x: Tensor, i: int) -> Tensor:
        if request.guidance == 1.0 or not sampler.is_guided(i, request.steps, request.guidance_interval):
            (cond,) = steps.velocities(x, i, (cache.COND,), run)
            return cond
        if zero and i < int(zero):
            return torch.zeros_like(x)
        cond, uncond = steps.velocities(x, i, (cache.COND, cache.UNCOND), run)
        return guide(cond, uncond, guidance)

    return velocity


class _Clock:
    """Time since the start, and what the remaining steps should take. What happens between steps does not count."""

    DECODE_STEPS = 1.0  # decoding costs about a step; close enough for an ETA

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self.now = now
        self.start = self.step_start = now()
        self.steps: list[float] = []

    @property
    def seconds(self) -> float:
        return self.now() - self.start

    def start_step(self) -> None:
        self.step_start = self.now()

    def end_step(self, remaining: int) -> tuple[float, float]:
        """Seconds of the step that just ended, and of all that is left."""
        self.steps.append(self.now() - self.step_start)
        return self.steps[-1], statistics.median(self.steps[-5:]) * (remaining + self.DECODE_STEPS)


@dataclass(frozen=True)
class Video:
    """A finished clip: frames uint8 [F, H, W, 3] at `fps`, with what made it."""

    frames: FramesHWC
    fps: float
    info: dict[str, Any]

    def save(self, path: str | Path) -> Path:
        """Write it; the extension chooses the format (mp4, webm, gif, png sequence)."""
        height, width = self.frames.shape[1:3]
        with VideoWriter(path, width=width, height=height, fps=self.fps, metadata=self.info) as writer:
            for frame in self.frames:
                writer.write(frame)
        return Path(path)


class Engine:
    """A model, ready to make videos.

    model: "pocket" (built in), an installed model's name, or the path of a model.toml. device: "cpu", "cuda", ... ;
    None takes a GPU if there is one. precision: "auto", "exact", "bf16" or "int8" (see `precision.py`). memory: a
    promise like "12GiB" or a number of bytes: the process stays below it, or a clip is refused before any work. vram:
    the same for the memory of a GPU; blocks that do not fit travel. compiled: see `compiling.py`.
    text_cache: whether the model's own negative prompt may be kept on disk (see `text_cache.py`).
    """

    def __init__(
        self,
        model: str | Path = "pocket",
        *,
        device: str | None = None,
        precision: str = "auto",
        memory: str | int | None = None,
        vram: str | int | None = None,
        compiled: bool = False,
        models_dir: Path | None = None,
        text_cache: bool = True,
    ) -> None:
        promised, on_device = (size_bytes(m) if isinstance(m, str) else m for m in (memory, vram))
        manifest, where = find_model(model, models_dir), devices.open_device(device, said="device ")
        kept = default_text_cache() if text_cache else None
        self.models = Models(
            manifest, where, precision, promised, kept, vram_bytes=on_device, compiled=compiled
        )

    def plan(self, request: GenerationRequest) -> GenerationRequest:
        """The request as it will run: see `planning.plan`."""
        return plan(request, self.models.manifest)

    def events(self, request: GenerationRequest, **options: Any) -> Iterator[Event]:
        """See `generate`."""
        return generate(self.models, request, **options)

    def generate(self, prompt: str, **options: Any) -> Video:
        """Make a video and keep its frames. Options are the fields of `GenerationRequest` and of `Conditioning`.

        Raises TypeError for an option that does not exist, and what `generate` raises.
        """
        request = self.plan(build_request(prompt, **options))
        assert request.fps is not None
        frames: FramesHWC | None = None
        info: dict[str, Any] = {}
        for event in self.events(request):
            if isinstance(event, Frames):
                if frames is None:
                    frames = np.empty((event.of, *event.frames.shape[1:]), np.uint8)
                frames[event.done - len(event.frames) : event.done] = event.frames
            elif isinstance(event, Result):
                info = event.info
        assert frames is not None
        return Video(frames, request.fps, info)


def build_request(prompt: str, **options: Any) -> GenerationRequest:
    """A request from flat keyword options, those of its conditioning included."""
    names = {f.name for f in fields(GenerationRequest)} - {"prompt"}
    shown = {f.name for f in fields(Conditioning)}
    unknown = options.keys() - names - shown
    if unknown:
        name = sorted(unknown)[0]
        raise TypeError(f"unknown option {name!r}. {suggest(name, sorted(names | shown))}")
    given = {k: v for k, v in options.items() if k in shown}
    if given:
        if "conditioning" in options:
            raise TypeError(
                f"both conditioning= and {sorted(given)[0]}= were given; put it into the conditioning"
            )
        options = {k: v for k, v in options.items() if k in names} | {"conditioning": Conditioning(**given)}
    return GenerationRequest(prompt=prompt, **options)
