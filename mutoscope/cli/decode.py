"""`mutoscope decode`: from latents to a file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from mutoscope.catalog import find_model
from mutoscope.cli import parse
from mutoscope.cli.common import Debug, Device, Json, Quiet, say, say_json
from mutoscope.cli.progress import make_display
from mutoscope.cli.running import Target, bytes_of, drive, open_models
from mutoscope.errors import FileError, RequestError
from mutoscope.events import Event, Result, Stage

Force = Annotated[bool, typer.Option("--force", help="Replace an existing file.")]


def decode(
    latents: Annotated[Path, typer.Argument(help="A file that generate left or kept.", show_default=False)],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="The video (default: the latents' name .mp4).", show_default=False
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="Default: the one that made the latents.", show_default=False),
    ] = None,
    device: Device = None,
    force: Force = False,
    json_: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Turn latents into a video: after a stop, or when decoding or writing had failed."""
    from mutoscope.engine import latents as storage

    tensor, info = storage.load(latents)
    name = model or info.get("model")
    if not name:
        raise RequestError(f"{latents} does not say which model made it.", hint="Name it with --model.")
    manifest = find_model(str(name))
    request = info.get("request", {})
    fps = float(request.get("fps") or manifest.defaults.fps)
    steps, done = request.get("steps"), info.get("steps_done")
    made = {k: v for k, v in info.items() if k != "steps_done" or done != steps}
    wanted = output or parse.decoded_path(latents)
    path = parse.output_paths(wanted, [""], force=force)[0]
    from mutoscope.engine.pipeline import decode as frames_of
    from mutoscope.engine.vae import SPATIAL_STRIDE
    from mutoscope.media.write import output_format

    output_format(path)
    display = make_display(json=json_, quiet=quiet)
    if path != wanted:
        display.note(f"{wanted} exists and is kept; writing {path} (--force replaces).")
    if done != steps:
        display.note(f"These are from step {done} of {steps}: an unfinished picture.")
    vae = open_models(manifest, device).vae
    if tensor.shape[1] != vae.config.z_dim:
        raise FileError(
            f"{latents} has {tensor.shape[1]} channels, the VAE of {manifest.name} {vae.config.z_dim}.",
            hint="Name the model that made it with --model.",
        )

    def events() -> Iterator[Event]:
        yield Stage(name="decode", seconds=0.0)
        yield from frames_of(vae, tensor.to(vae.conv2.weight.device))
        yield Result(seconds=0.0, info=made)

    height, width = (n * SPATIAL_STRIDE for n in tensor.shape[3:])
    drive(events(), Target(path, width, height, fps, made), display)
    if json_:
        say_json({"event": "result", "output": path, "size_bytes": bytes_of(path), "width": width,
                  "height": height, "fps": fps, "model": manifest.name})  # fmt: skip
    else:
        say(str(path), style="" if quiet else "bold")
