"""Whole model sets of random weights in the published sizes: files and a `model.toml`, written once and found again."""

from __future__ import annotations

from pathlib import Path

from mutoscope.catalog import OFFICIAL_NEGATIVE_PROMPT
from scripts.make_random_model import CONFIGS, with_layers, write_random_model

TOML = """name = "{name}"
sizes = [[480, 256], [832, 480], [1280, 720]]

[files]
dit = "{dit}"
text_encoder = "{text}"
vae = "{vae}"

[defaults]
steps = 50
guidance = 5.0
shift = 3.0
sampler = "unipc"
width = 480
height = 256
frames = 17
fps = 16.0
negative_prompt = "{negative}"
"""


def write_set(
    folder: Path, dit: str, type_name: str, *, layers: int | None = None, text_layers: int = 24
) -> Path:
    """The path of a model.toml; `dit` is a name of `make_random_model`, the text encoder UMT5-XXL in Q8_0."""
    folder.mkdir(parents=True, exist_ok=True)
    text, transformer = CONFIGS["umt5-xxl"], CONFIGS[dit]
    name = dit
    if layers is not None:
        transformer, name = with_layers(transformer, layers), f"{dit}-{layers}"
    files = {
        "dit": (transformer, f"{name}-{type_name}.gguf", type_name),
        "text": (with_layers(text, text_layers), f"umt5-xxl-{text_layers}-Q8_0.gguf", "Q8_0"),
        "vae": (CONFIGS["vae"], "vae-F16.safetensors", "F16"),
    }
    for config, file, file_type in files.values():
        if not (folder / file).exists():
            write_random_model(config, folder / file, file_type)
    toml = folder / f"{name}-{type_name}-{text_layers}.toml"
    names = {key: file for key, (_, file, _) in files.items()}
    toml.write_text(TOML.format(name=toml.stem, negative=OFFICIAL_NEGATIVE_PROMPT, **names), "utf-8")
    return toml
