"""`mutoscope inspect`, `mutoscope calibrate` and `mutoscope quantize`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from mutoscope.cli import remake
from mutoscope.cli.common import Debug, Json, Quiet, console, say, say_json, size_text
from mutoscope.errors import FileError, RequestError

WEIGHTS = (".gguf", ".safetensors", ".pth", ".pt", ".bin")


def inspect(
    file: Annotated[
        Path, typer.Argument(help="A model file, latents, a video or a picture.", show_default=False)
    ],
    json_: Json = False,
    debug: Debug = False,
) -> None:
    """Say what a file holds: the layout of a model, or how a video was made and how to make it again."""
    if not file.exists():
        raise FileError(f"{file}: no such file.")
    if file.suffix.lower() in WEIGHTS or _is_gguf(file):
        latents = _latents_info(file)
        if latents is not None:
            _print_latents(file, latents, json_=json_)
            return
        from mutoscope.engine.inspect import inspect_file, render

        report = inspect_file(file)
        if json_:
            say_json(report)
        else:
            say(render(report))
        return
    _inspect_media(file, json_=json_)


def _is_gguf(file: Path) -> bool:
    if not file.is_file():
        return False
    with file.open("rb") as f:
        return f.read(4) == b"GGUF"


def _latents_info(file: Path) -> dict[str, Any] | None:
    """What `generate` wrote into its latents, without reading the tensor; None for other files."""
    if file.suffix.lower() != ".safetensors":
        return None
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np") as f:
            info = json.loads((f.metadata() or {}).get("mutoscope", "null"))
            return {**info, "shape": list(f.get_slice("latents").get_shape())} if info else None
    except (SafetensorError, ValueError, OSError):
        return None  # the reader of weights says what is wrong


def _print_latents(file: Path, info: dict[str, Any], *, json_: bool) -> None:
    if json_:
        say_json({"kind": "latents", **info, "command": remake.command(info)})
        return
    say(f"{file.name}: latents of shape {info['shape']}", style="bold")
    _print_making(info)
    say(f"To see them: mutoscope decode {file}")


def _inspect_media(file: Path, *, json_: bool) -> None:
    from mutoscope.media.read import probe
    from mutoscope.media.write import read_metadata

    pictures = sorted(file.glob("*.png")) if file.is_dir() else []
    if file.is_dir() and not pictures:
        hint = "Name one of the files in it." if (file / "model.toml").exists() else ""
        raise FileError(f"{file}: is a folder without PNG pictures.", hint=hint)
    media = probe(pictures[0] if pictures else file)
    n_frames = len(pictures) or media.frames
    info = read_metadata(file)
    command = remake.command(info) if info else None
    if json_:
        facts = {k: v for k, v in vars(media).items() if k != "metadata"}
        say_json({**facts, "frames": n_frames, "mutoscope": info, "command": command})
        return
    kind = "picture sequence" if pictures else media.kind
    say(f"{file.name}: {kind}", style="bold")
    fps = media.fps or (info or {}).get("request", {}).get("fps")
    length = f", {n_frames} frames" + (f", {n_frames / fps:.1f} s at {fps:g} fps" if fps else "")
    say(f"  {'picture':<10} {media.width}x{media.height}{length if n_frames > 1 else ''}, {media.codec}")
    if not pictures:
        say(f"  {'size':<10} {size_text(media.size_bytes)}")
    if info is None:
        say("Not made by Mutoscope, or its metadata was removed.")
        return
    _print_making(info)
    say(
        "To make it again:"
        if command
        else "It was made by the library with arrays or a composition: no command can repeat it."
    )
    if command:
        console().print(command, markup=False, soft_wrap=True)  # never broken: it is to be copied


def _print_making(info: dict[str, Any]) -> None:
    request = info.get("request", {})
    digests = info.get("lora_sha256", {})
    unfinished = info.get("steps_done", request.get("steps")) != request.get("steps")
    settings = ("steps", "guidance", "shift", "sampler", "quality")
    rows = {
        "prompt": request.get("prompt"),
        "avoided": request.get("negative_prompt"),
        "model": info.get("model"),
        "seed": info.get("seed"),
        "settings": ", ".join(f"{k} {request[k]}" for k in settings if k in request),
        "LoRAs": ", ".join(
            f"{Path(name).name} {strength:g} (sha256 {digests.get(name, '')[:12]})"
            for name, strength in request.get("loras", ())
        ),
        "followed": ", ".join(request.get("conditioning", {})),
        "version": info.get("version"),
        "finished": f"no, step {info['steps_done']} of {request.get('steps')}" if unfinished else "",
    }
    for name, value in rows.items():
        if value not in (None, ""):
            say(f"  {name:<10} {value}")


def calibrate(
    file: Annotated[Path, typer.Argument(help="A transformer's weight file.", show_default=False)],
    json_: Json = False,
    debug: Debug = False,
) -> None:
    """Measure which layers of a model stand 8-bit integers; --precision auto keeps the others in bfloat16.

    The result is written beside the file, as FILE.precision.json.
    """
    if not file.is_file():
        raise FileError(f"{file}: no such file.")
    from mutoscope.engine import calibrate as calibration
    from mutoscope.engine.inspect import render_precision

    report = calibration.calibrate([file])
    target = calibration.write_sidecar(file, report)
    if json_:
        say_json({"event": "result", "output": target, **report})
    else:
        say(str(target), style="bold")
        say("\n".join(render_precision(report)))


def quantize(
    source: Annotated[Path, typer.Argument(help="A .gguf, .safetensors or .pth file.", show_default=False)],
    target: Annotated[Path, typer.Argument(help="The .gguf file to write.", show_default=False)],
    type_: Annotated[
        str,
        typer.Option("--type", "-t", help="Q8_0, Q6_K, Q5_K_M, Q4_K_M, Q3_K_S, F16, ...", show_default=False),
    ],
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
    quiet: Quiet = False,
    json_: Json = False,
    debug: Debug = False,
) -> None:
    """Make a model file smaller, with the community's choice of types for each part of the network."""
    from rich.progress import Progress

    if target.exists() and not force:
        raise RequestError(
            f"The file {target} exists.", hint="Choose another name, or --force to replace it."
        )
    if not target.parent.is_dir():
        raise FileError(f"{target}: the folder {target.parent} does not exist.", hint="Create it first.")
    if not source.is_file():
        raise FileError(f"{source}: no such file.")
    from mutoscope.engine.quantize import quantize_file

    show = console(err=True).is_terminal and not (quiet or json_)
    with Progress(console=console(err=True), transient=True, disable=not show) as progress:
        task = progress.add_task(f"Writing {target.name}", total=None)
        quantize_file(source, target, type_.upper(),
                      lambda done, of: progress.update(task, completed=done, total=of))  # fmt: skip
    before, after = source.stat().st_size, target.stat().st_size
    if json_:
        say_json({"event": "result", "output": target, "size_bytes": after, "source_bytes": before})
    elif quiet:
        say(str(target))
    else:
        say(f"{target}: {size_text(after)}, {after / before:.0%} of {size_text(before)}")
