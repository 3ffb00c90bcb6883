"""The engine against `diffusers` and against this machine: one transformer forward and one VAE decode.

    make bench                          # six minutes on two cores, 2 GB of disk while it runs
    python -m benchmarks.engine --quick # one minute: fewer layers, a smaller picture

Same file, same inputs, same process; contenders run in turns and the warm-up is left out. Both sides compute in
bfloat16 (float32 on processors without it) from GGUF (transformer) and 16-bit safetensors (VAE) with random weights
of the published 1.3B shape. The error of both is against `diffusers` in float32. What is done once per clip is not
in the time of a forward: for ours the prompt's keys and values and the time embedding, which `diffusers` computes
anew in every step because its interface is so; their time is given beside.

The last line is JSON. Threads are bound to cores (OMP_PROC_BIND=true unless set): unbound, the same product took up
to three times as long.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

PUBLISHED_LAYERS = 30
PROMPT_TOKENS = 60
QUIET = 1.25
"""Slowest over fastest round of one contender, above which a run is not worth reporting."""


def main() -> None:
    args = _arguments()
    if "OMP_PROC_BIND" not in os.environ:  # read once, when the OpenMP library starts
        os.environ["OMP_PROC_BIND"] = "true"
        os.execv(sys.executable, [sys.executable, "-m", "benchmarks.engine", *sys.argv[1:]])

    import torch

    from benchmarks.measure import machine

    if args.threads:
        torch.set_num_threads(args.threads)
    report: dict[str, Any] = {"benchmark": "engine", **machine(), "rounds": args.rounds}
    print(f"{report['cpu']}, {report['threads']} threads, torch {report['torch']}, {args.rounds} rounds")
    with ExitStack() as stack, torch.inference_mode():
        folder = args.files or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if args.only in (None, "dit"):
            report["dit"] = transformer(folder, args)
        if args.only in (None, "vae"):
            report["vae"] = decoder(folder, args)
    print(json.dumps(report))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.engine", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--quick", action="store_true", help="4 layers, 256x128x9, VAE 128x128x5")
    parser.add_argument(
        "--size", type=_size, help="of the clip for the transformer (default 480x256x9: 1,440 tokens)"
    )
    parser.add_argument("--layers", type=int, help=f"of {PUBLISHED_LAYERS} (the default)")
    parser.add_argument("--type", default="Q8_0", help="of the transformer's weights, default %(default)s")
    parser.add_argument("--vae-size", type=_size, help="of the clip to decode (default 240x128x9)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--only", choices=("dit", "vae"))
    parser.add_argument("--files", type=Path, help="folder where model files are kept and found again")
    args = parser.parse_args()
    args.size = args.size or ((256, 128, 9) if args.quick else (480, 256, 9))
    args.layers = args.layers or (4 if args.quick else PUBLISHED_LAYERS)
    args.vae_size = args.vae_size or ((128, 128, 5) if args.quick else (240, 128, 9))
    return args


def _size(text: str) -> tuple[int, int, int]:
    width, height, frames = map(int, text.split("x"))
    if width % 16 or height % 16 or frames % 4 != 1:
        raise argparse.ArgumentTypeError("width and height must be multiples of 16, frames 4n + 1")
    return width, height, frames


def transformer(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """One forward at noise level 700 for one prompt, batch 1."""
    import torch

    from benchmarks import ceilings, peers
    from benchmarks.measure import in_turns, relative_error
    from mutoscope.engine.linear import default_compute_dtype
    from mutoscope.engine.memory import n_tokens
    from mutoscope.engine.wan import rope_table
    from mutoscope.engine.weights import load_wan
    from scripts.make_random_model import CONFIGS, with_layers, write_random_model

    config = with_layers(CONFIGS["t2v-1.3b"], args.layers)
    path = folder / f"t2v-1.3b-{args.layers}-{args.type}.gguf"
    if not path.exists():
        write_random_model(config, path, args.type)
    width, height, frames = args.size
    tokens = n_tokens(width, height, frames)
    dtype = default_compute_dtype(torch.device("cpu"))
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(1, config.in_dim, (frames + 3) // 4, height // 8, width // 8, generator=rng)
    rows = torch.randn(1, PROMPT_TOKENS, config.text_dim, generator=rng)
    t = torch.tensor([700.0])

    model = load_wan(path)
    grid = (x.shape[2], x.shape[3] // 2, x.shape[4] // 2)
    rope = rope_table(grid, config.head_dim)
    text, time = model.text_context(rows, [PROMPT_TOKENS]), model.time_modulation(t)
    padded = peers.padded_text(rows)

    exact = peers.load_transformer(path, config, torch.float32)
    expected = exact(x, t, padded, return_dict=False)[0]
    del exact
    peer = peers.load_transformer(path, config, dtype)

    def ours() -> torch.Tensor:
        return model(x, time, text, rope)

    def theirs() -> torch.Tensor:
        return peer(x.to(dtype), t, padded.to(dtype), return_dict=False)[0]

    def once_per_clip() -> None:
        model.text_context(rows, [PROMPT_TOKENS])
        model.time_modulation(t)

    products = ceilings.products_of_a_block(config, tokens, dtype)
    errors = {"ours": relative_error(ours(), expected), "diffusers": relative_error(theirs(), expected)}
    runs = {"ours": ours, "diffusers": theirs, "products of one block": products, "prompt": once_per_clip}
    seconds = in_turns(runs, args.rounds)

    linear, attention = (
        ceilings.linear_flops(config, tokens),
        ceilings.attention_flops(config, tokens, PROMPT_TOKENS + 1),
    )
    rate = linear / config.n_layers / min(seconds["products of one block"].rounds)
    report = {
        "case": f"DiT forward, 1.3B shape, {args.layers} layers, {args.type}, {width}x{height}x{frames}",
        "tokens": tokens,
        "layers": args.layers,
        "dtype": str(dtype).removeprefix("torch."),
        "ours": {**seconds["ours"].as_json(), "relative_error": errors["ours"]},
        "diffusers": {**seconds["diffusers"].as_json(), "relative_error": errors["diffusers"]},
        "once_per_clip": seconds["prompt"].as_json(),
        "tflop": (linear + attention) / 1e12,
        "ceiling_gflops": rate / 1e9,
        "floor_s": (linear + attention) / rate,
    }
    _conclude(report)
    if args.layers < PUBLISHED_LAYERS:
        scaled = report["ours"]["median_s"] * PUBLISHED_LAYERS / args.layers
        report["ours_scaled_to_30_layers_s"] = scaled
        print(
            f"  {args.layers} of {PUBLISHED_LAYERS} layers were run: ours would take {scaled:.1f} s, if scaled"
        )
    return report


def decoder(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """One decode of random latents, whole frames, full width."""
    import torch

    from benchmarks import ceilings, peers
    from benchmarks.measure import in_turns, relative_error
    from mutoscope.engine.linear import default_compute_dtype
    from mutoscope.engine.weights import load_vae
    from scripts.make_random_model import CONFIGS, write_random_model

    config = CONFIGS["vae"]
    path = folder / "vae-F16.safetensors"
    if not path.exists():
        write_random_model(config, path, "F16")
    width, height, frames = args.vae_size
    dtype = default_compute_dtype(torch.device("cpu"))
    rng = torch.Generator().manual_seed(0)
    z = torch.randn(1, config.z_dim, (frames + 3) // 4, height // 8, width // 8, generator=rng)
    z_raw = peers.denormalised(z, config)

    exact = peers.load_vae(path, config, torch.float32)
    expected = exact.decode(z_raw, return_dict=False)[0]
    del exact
    vae, peer = load_vae(path), peers.load_vae(path, config, dtype)
    last = peers.channels_last(peers.load_vae(path, config, dtype))

    def ours() -> torch.Tensor:
        return vae.decode(z)

    def theirs() -> torch.Tensor:
        return peer.decode(z_raw.to(dtype), return_dict=False)[0]

    def theirs_last() -> torch.Tensor:
        z_last = z_raw.to(dtype).contiguous(memory_format=torch.channels_last_3d)
        return last.decode(z_last, return_dict=False)[0]

    errors = {"ours": relative_error(ours(), expected), "diffusers": relative_error(theirs(), expected)}
    convolutions = ceilings.decoder_convolutions(config, width, height, frames)
    alone: dict[Any, Callable[[], object]] = {c: ceilings.runner(c, dtype) for c in convolutions}
    seconds = in_turns(
        {"ours": ours, "diffusers": theirs, "diffusers, channels last": theirs_last}, args.rounds
    )
    singles = in_turns(alone, args.rounds)
    flops = sum(n * ceilings.convolution_flops(c) for c, n in convolutions.items())
    floor = sum(n * min(singles[c].rounds) for c, n in convolutions.items())
    report = {
        "case": f"VAE decode, full width, {width}x{height}x{frames}",
        "dtype": str(dtype).removeprefix("torch."),
        "ours": {**seconds["ours"].as_json(), "relative_error": errors["ours"]},
        "diffusers": {**seconds["diffusers"].as_json(), "relative_error": errors["diffusers"]},
        "diffusers_channels_last": seconds["diffusers, channels last"].as_json(),
        "tflop": flops / 1e12,
        "ceiling_gflops": flops / floor / 1e9,
        "floor_s": floor,
    }
    _conclude(report)
    return report


def _conclude(report: dict[str, Any]) -> None:
    """Add the ratios and print it all. Others on the machine only ever add time, so the minima are compared too."""
    ours, theirs, floor = report["ours"], report["diffusers"], report["floor_s"]
    report["diffusers_over_ours"] = theirs["median_s"] / ours["median_s"]
    report["diffusers_over_ours_of_minima"] = theirs["min_s"] / ours["min_s"]
    report["share_of_floor"] = floor / ours["min_s"]
    report["quiet"] = all(row["max_s"] < QUIET * row["min_s"] for row in (ours, theirs))
    print(f"\n{report['case']}, {report['dtype']}, {report['tflop']:.2f} TFLOP")
    for key in ("ours", "diffusers", "diffusers_channels_last", "once_per_clip"):
        if key in report:
            row = report[key]
            error = f"  error {row['relative_error']:.4f}" if "relative_error" in row else ""
            spread = f"{row['min_s']:.2f} to {row['max_s']:.2f}"
            print(f"  {key.replace('_', ' '):<24} {row['median_s']:8.2f} s  ({spread}){error}")
    print(
        f"  {'floor':<24} {floor:8.2f} s  at {report['ceiling_gflops']:.0f} GFLOP/s, measured in the same run"
    )
    print(
        f"  diffusers / ours {report['diffusers_over_ours']:.2f} (of minima "
        f"{report['diffusers_over_ours_of_minima']:.2f}), floor / ours {report['share_of_floor']:.2f}"
    )
    if not report["quiet"]:
        print("  The machine was busy with other things; these ratios mean little. Run again.")


if __name__ == "__main__":
    main()
