"""`mutoscope generate`: from prompts to files."""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from mutoscope.catalog import POCKET, default_loras_dir, find_model
from mutoscope.cli import parse
from mutoscope.cli.common import (
    Compile,
    Debug,
    Device,
    Json,
    Memory,
    Precision,
    Quiet,
    Vram,
    say,
    say_json,
    size_text,
    time_text,
)
from mutoscope.cli.progress import Display, make_display
from mutoscope.cli.running import Target, bytes_of, drive, open_models
from mutoscope.errors import Cancelled, FileError, RequestError
from mutoscope.manifest import ModelManifest

if TYPE_CHECKING:
    from mutoscope.engine.models import Models
    from mutoscope.request import GenerationRequest, Lora

_SHOW = "Pictures and clips to follow"
_LENGTH = "Size and length"
_SAMPLING = "Sampling"
_OUTPUT = "Output"

Force = Annotated[bool, typer.Option("--force", help="Replace an existing file.", rich_help_panel=_OUTPUT)]


def generate(
    prompt: Annotated[str | None, typer.Argument(help="What the video shows.", show_default=False)] = None,
    file: Annotated[
        Path | None,
        typer.Option("--file", "-f", help="A text file of prompts, one a line.", show_default=False),
    ] = None,
    model: Annotated[
        str, typer.Option("--model", "-m", help="An installed model, or the path of a model.toml.")
    ] = POCKET,
    image: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="The first frame.", show_default=False, rich_help_panel=_SHOW),
    ] = None,
    last_image: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="The last frame.", show_default=False, rich_help_panel=_SHOW),
    ] = None,
    keyframe: Annotated[
        list[str] | None,
        typer.Option(
            metavar="N=FILE",
            help="The picture of frame N (from 0; -1 is the last). Repeatable.",
            show_default=False,
            rich_help_panel=_SHOW,
        ),
    ] = None,
    ref: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE",
            help="A picture of something to show. Repeatable, in order.",
            show_default=False,
            rich_help_panel=_SHOW,
        ),
    ] = None,
    video: Annotated[
        str | None,
        typer.Option(
            metavar="CLIP",
            help="A clip to follow; with --mask or --box, to repaint; with --outpaint, to surround.",
            show_default=False,
            rich_help_panel=_SHOW,
        ),
    ] = None,
    control: Annotated[
        Literal["as-is", "gray"],
        typer.Option(
            help="How --video is followed: as it is, or its brightness only.", rich_help_panel=_SHOW
        ),
    ] = "as-is",
    mask: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="A picture or clip: white is repainted.",
            show_default=False,
            rich_help_panel=_SHOW,
        ),
    ] = None,
    box: Annotated[
        list[str] | None,
        typer.Option(
            metavar="X0,Y0,X1,Y1",
            help="A part to repaint, in fractions of the frame. Repeatable.",
            show_default=False,
            rich_help_panel=_SHOW,
        ),
    ] = None,
    outpaint: Annotated[
        str | None,
        typer.Option(
            metavar="SIDE=N,...",
            help="New picture around --video, like left=0.25,top=0.5 (of its width or height).",
            show_default=False,
            rich_help_panel=_SHOW,
        ),
    ] = None,
    extend_start: Annotated[
        str | None,
        typer.Option(
            metavar="CLIP", help="Go on from the end of this clip.", show_default=False, rich_help_panel=_SHOW
        ),
    ] = None,
    extend_end: Annotated[
        str | None,
        typer.Option(
            metavar="CLIP",
            help="Lead up to the start of this clip.",
            show_default=False,
            rich_help_panel=_SHOW,
        ),
    ] = None,
    track: Annotated[
        list[str] | None,
        typer.Option(
            metavar='"T:X0,Y0,X1,Y1 ..."',
            help="A box that something follows, by time; all from 0 to 1. Repeatable.",
            show_default=False,
            rich_help_panel=_SHOW,
        ),
    ] = None,
    strength: Annotated[
        float, typer.Option(help="How strictly the above is followed.", rich_help_panel=_SHOW)
    ] = 1.0,
    size: Annotated[
        str | None,
        typer.Option(
            metavar="WxH",
            help="In pixels, multiples of 16 (default: the model's).",
            show_default=False,
            rich_help_panel=_LENGTH,
        ),
    ] = None,
    seconds: Annotated[
        float | None,
        typer.Option(help="Length (default: the model's).", show_default=False, rich_help_panel=_LENGTH),
    ] = None,
    frames: Annotated[
        int | None,
        typer.Option(help="Length in frames, 4n+1.", show_default=False, rich_help_panel=_LENGTH),
    ] = None,
    fps: Annotated[
        float | None,
        typer.Option(
            help="Frames per second (default: the model's).", show_default=False, rich_help_panel=_LENGTH
        ),
    ] = None,
    quality: Annotated[
        Literal["draft", "standard"],
        typer.Option(help="A draft takes 40 % of the steps.", rich_help_panel=_SAMPLING),
    ] = "standard",
    steps: Annotated[
        int | None,
        typer.Option(
            help="More steps, more detail (default: the model's).",
            show_default=False,
            rich_help_panel=_SAMPLING,
        ),
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option(
            help="How strictly the prompt is followed; 1 is fastest (default: the model's).",
            show_default=False,
            rich_help_panel=_SAMPLING,
        ),
    ] = None,
    shift: Annotated[
        float | None,
        typer.Option(
            help="More time for layout, less for detail (default: the model's).",
            show_default=False,
            rich_help_panel=_SAMPLING,
        ),
    ] = None,
    sampler: Annotated[
        str | None,
        typer.Option(
            help="unipc, dpm++, euler, or distill4 for distilled models (default: the model's).",
            show_default=False,
            rich_help_panel=_SAMPLING,
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            help="The same seed gives the same video (default: random, printed).",
            show_default=False,
            rich_help_panel=_SAMPLING,
        ),
    ] = None,
    negative: Annotated[
        str | None,
        typer.Option(
            help="What to avoid (default: the model's).", show_default=False, rich_help_panel=_SAMPLING
        ),
    ] = None,
    guidance_interval: Annotated[
        str,
        typer.Option(
            metavar="FROM,TO",
            help="The part of the steps that is guided, as fractions, like 0.2,0.8; the rest takes half the time.",
            rich_help_panel=_SAMPLING,
        ),
    ] = "0,1",
    guidance_kept: Annotated[
        float | None,
        typer.Option(
            help="The guidance of what is given and kept: frames, and what a mask leaves (default: the model's).",
            show_default=False,
            rich_help_panel=_SAMPLING,
        ),
    ] = None,
    guidance_kind: Annotated[
        str,
        typer.Option(
            metavar="KIND",
            help="cfg, or zero-star (CFG-Zero*), with the number of steps left out at the start: zero-star=1.",
            rich_help_panel=_SAMPLING,
        ),
    ] = "cfg",
    cache: Annotated[
        str,
        typer.Option(
            metavar="KIND[=THRESHOLD]",
            help="Leave out steps that change little: easy, tea, mag, or none. See docs/faster.md.",
            rich_help_panel=_SAMPLING,
        ),
    ] = "none",
    lora: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE[=STRENGTH]",
            help="A LoRA: a file, or a name that `mutoscope loras` lists. Repeatable.",
            show_default=False,
            rich_help_panel=_SAMPLING,
        ),
    ] = None,
    device: Device = None,
    precision: Precision = "auto",
    memory: Memory = None,
    vram: Vram = None,
    compile_: Compile = False,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="A .mp4, .webm, .gif, or a folder for pictures (default: the prompt's words .mp4).",
            show_default=False,
            rich_help_panel=_OUTPUT,
        ),
    ] = None,
    force: Force = False,
    keep_latents: Annotated[
        bool, typer.Option("--keep-latents", help="Keep the latents after success.", rich_help_panel=_OUTPUT)
    ] = False,
    dump_conditioning: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Write what the model is shown as pictures.",
            show_default=False,
            rich_help_panel=_OUTPUT,
        ),
    ] = None,
    json_: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Make a video of a prompt, and of pictures and clips to follow.

    Ctrl-C stops at the next step and keeps the latents. See docs/conditioning.md for what can be followed.
    """
    from mutoscope.planning import frames_for, plan
    from mutoscope.request import Conditioning, GenerationRequest, Keyframe

    if (prompt is None) == (file is None):
        both = "Both a prompt and a file of prompts were given."
        raise RequestError(
            "There is no prompt." if prompt is None else both,
            hint='Like: mutoscope generate "a red ball falls and bounces", or --file prompts.txt',
        )
    if seconds is not None and frames is not None:
        raise RequestError("Both --seconds and --frames were given.", hint="Give one of them.")
    texts = parse.prompts(file) if file is not None else [prompt or ""]
    manifest = find_model(model)
    width, height = parse.size(size) if size is not None else (None, None)
    keyframes = [Keyframe(image=image)] if image is not None else []
    keyframes += [parse.keyframe(k) for k in keyframe or ()]
    keyframes += [Keyframe(image=last_image, index=-1)] if last_image is not None else []
    if seconds is not None:
        if not 0 < seconds < 1e6:
            raise RequestError(f"--seconds {seconds}: more than 0 expected.")
        frames = frames_for(seconds, fps or manifest.defaults.fps)
    request = GenerationRequest(
        prompt="",
        negative_prompt=negative,
        conditioning=Conditioning(
            keyframes=tuple(keyframes),
            video=video,
            control=control,
            mask=mask,
            boxes=tuple(parse.box(b) for b in box or ()),
            outpaint=parse.outpaint(outpaint) if outpaint is not None else None,
            extend_start=extend_start,
            extend_end=extend_end,
            references=tuple(ref or ()),
            tracks=tuple(parse.track(t) for t in track or ()),
            strength=strength,
        ),
        width=width,
        height=height,
        frames=frames,
        fps=fps,
        steps=steps,
        guidance=guidance,
        shift=shift,
        sampler=sampler,
        seed=seed,
        quality=quality,
        loras=tuple(_found(parse.lora(text), manifest) for text in lora or ()),
        guidance_interval=parse.interval(guidance_interval),
        guidance_kept=guidance_kept,
        guidance_kind=guidance_kind,
        cache=cache,
    )
    requests = [plan(replace(request, prompt=text), manifest) for text in texts]
    outputs = parse.output_paths(output, texts, force=force)
    jobs = [_Job(r, path, _dump_folder(dump_conditioning, n, len(texts)))
            for n, (r, path) in enumerate(zip(requests, outputs, strict=True), 1)]  # fmt: skip
    for job in jobs:
        job.check_output()
    display = make_display(json=json_, quiet=quiet)
    _advise(jobs, manifest, output, display)
    models = open_models(manifest, device, precision, memory, vram, compile_)
    for job in jobs:
        result, took = _run(job, models, display, keep_latents=keep_latents)
        if json_:
            say_json(result)
        elif quiet:
            say(str(job.output))
        else:
            _report(job, result, took, manifest)
    if not (json_ or quiet):
        _suggest(jobs[-1], manifest)


def _found(lora: Lora, manifest: ModelManifest) -> Lora:
    """The file of a name in the folder of LoRAs; the model's own names and files come first."""
    name, strength = str(lora[0]), lora[1]
    if name in manifest.loras or Path(name).exists():
        return lora
    from mutoscope.loras import Shelf

    shelf = Shelf(default_loras_dir())
    return (shelf.get(name).path, strength) if shelf.find(name) else lora


@dataclass(frozen=True)
class _Job:
    """One video: its planned request, where it goes, and where its inputs are dumped."""

    request: GenerationRequest
    output: Path
    dump: Path | None = None

    def check_output(self) -> None:
        from mutoscope.media.write import SEQUENCE, output_format

        if output_format(self.output) in ("png", "jpg", "jpeg", "webp") and self.request.frames != 1:
            raise RequestError(
                f"{self.output} holds one picture, the video has {self.request.frames} frames.",
                hint='Ask for --frames 1, or write "name-%04d.png".',
            )
        if self.dump is not None:
            self.dump.mkdir(parents=True, exist_ok=True)
            for part in ("frames", "mask"):
                output_format(self.dump / part, SEQUENCE)


def _dump_folder(folder: Path | None, n: int, of: int) -> Path | None:
    return folder / f"{n:02d}" if folder is not None and of > 1 else folder


def _advise(jobs: list[_Job], manifest: ModelManifest, asked: Path | None, display: Display) -> None:
    """What may surprise, said before the work."""
    if asked is not None and len(jobs) == 1 and not asked.is_dir() and jobs[0].output != asked:
        display.note(f"{asked} exists and is kept; writing {jobs[0].output} (--force replaces).")
    if manifest.files.vocabulary is None:
        return
    try:
        vocabulary = json.loads(manifest.files.vocabulary.path.read_text("utf-8"))
    except (OSError, ValueError) as e:
        raise FileError(f"{manifest.files.vocabulary.path}: is not a list of words ({e}).") from e
    unknown = list(
        dict.fromkeys(w for job in jobs for w in parse.unknown_words(job.request.prompt, vocabulary))
    )
    if unknown:
        words = ", ".join(unknown[:8]) + (", ..." if len(unknown) > 8 else "")
        these = "a word" if len(unknown) == 1 else "words"
        display.note(f"The model {manifest.name} was not trained on {these} of this prompt: {words}")


# -- running -------------------------------------------------------------------------------------------------


def _run(job: _Job, models: Models, display: Display, *, keep_latents: bool) -> tuple[dict[str, Any], float]:
    """Make one video. Whatever happens after the first step, its latents are there unless it succeeded."""
    from mutoscope.engine.pipeline import generate as events_of
    from mutoscope.planning import describe

    latents = parse.latents_path(job.output)
    r = job.request
    events = events_of(models, r, keep_latents=latents, dump_conditioning=job.dump)
    width, height, fps = r.width or 0, r.height or 0, r.fps or 0.0  # never None: the request is planned
    target = Target(job.output, width, height, fps, describe(r, models.manifest, models.precision))
    rescue = f"mutoscope decode {shlex.quote(str(latents))} -o {shlex.quote(str(job.output))}"
    try:
        result = drive(events, target, display)
    except Cancelled as e:
        kept = (
            f"The latents so far are kept. To see them: {rescue}" if latents.exists() else "Nothing was kept."
        )
        raise Cancelled(e.message, hint=kept) from None
    except BaseException as e:
        if latents.exists():
            e.add_note(f"The denoised latents are kept. To try the rest again: {rescue}")
        raise
    if not keep_latents:
        latents.unlink()
    facts = {
        "event": "result",
        "output": job.output,
        "size_bytes": bytes_of(job.output),
        "width": width,
        "height": height,
        "frames": r.frames,
        "fps": fps,
        "seed": r.seed,
        "model": models.manifest.name,
        "prompt": r.prompt,
        "took_seconds": round(result.seconds, 2),
        "latents": latents if keep_latents else None,
    }
    return facts, result.seconds


def _report(job: _Job, facts: dict[str, Any], took: float, manifest: ModelManifest) -> None:
    r = job.request
    say(str(job.output), style="bold")
    frames, fps = facts["frames"], facts["fps"]
    length = "1 picture" if frames == 1 else f"{frames} frames, {frames / fps:.1f} s at {fps:g} fps"
    say(f"  {r.width}x{r.height}, {length}, {size_text(facts['size_bytes'])}")
    say(f"  model {manifest.name}, seed {r.seed}, {r.steps} steps, made in {time_text(took)}")
    if facts["latents"]:
        say(f"  latents {facts['latents']}")


def _suggest(job: _Job, manifest: ModelManifest) -> None:
    """What to try next, by what was made."""
    if job.request.quality == "draft":
        say(f"Next: the same at full quality, with --seed {job.request.seed} and without --quality draft.")
    else:
        output = shlex.quote(str(job.output))
        say(f"Next: another take with another --seed, or go on from its end with --extend-start {output}")
    if manifest.name == POCKET:
        say("The starter knows plain shapes only. For real scenes: mutoscope models")
