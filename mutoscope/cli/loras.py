"""`mutoscope loras`: the files that --lora and the service's requests may name."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from mutoscope.catalog import POCKET, default_loras_dir, find_model, installed_models
from mutoscope.cli.common import Debug, Json, console, say, say_json, size_text
from mutoscope.errors import FileError
from mutoscope.manifest import ModelManifest


def loras(
    folder: Annotated[
        Path | None,
        typer.Option("--dir", help="The folder (default: loras, beside the models).", show_default=False),
    ] = None,
    json_: Json = False,
    debug: Debug = False,
) -> None:
    """List the LoRA files that can be named, and which models can take them."""
    from mutoscope.digests import sha256_of
    from mutoscope.loras import Shelf

    place = folder or default_loras_dir()
    models = _models()
    rows: list[dict[str, Any]] = []
    for lora in Shelf(place).all():
        fits = [] if lora.problem else [m.name for m in models if _fits(lora.path, m)]
        rows.append({**vars(lora), "sha256": sha256_of(lora.path), "models": fits})
    own = [{"name": name, "model": m.name, "path": lora.file.path, **lora.settings}
           for m in models for name, lora in m.loras.items()]  # fmt: skip
    if json_:
        say_json({"loras_dir": place, "loras": rows, "of_models": own})
        return
    if not rows:
        say(f"No LoRAs in {place}: files of safetensors or GGUF that are put there can be named.")
    else:
        say(str(place), style="bold")
        table = Table("name", "size", "rank", "for models", "sha256", box=None, pad_edge=False)
        for row in rows:
            taken = row["problem"] or ", ".join(row["models"]) or "none that is installed"
            table.add_row(
                row["name"], size_text(row["size_bytes"]), str(row["rank"] or "-"), taken, row["sha256"][:12]
            )
        console().print(table, markup=False)
    for row in own:
        say(f"{row['name']}: belongs to {row['model']}")


def _models() -> list[ModelManifest]:
    found = [m.manifest for m in installed_models() if m.manifest is not None and not m.problem]
    try:
        return [find_model(POCKET), *found]
    except FileError:  # a checkout without the starter's weights
        return found


def _fits(path: Path, model: ModelManifest) -> bool:
    from mutoscope.loras import check_lora

    try:
        check_lora(path, model)
    except FileError:
        return False
    return True
