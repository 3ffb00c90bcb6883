"""The engine on a GPU against `diffusers` with the same file on the same card, and against the card itself.

    python -m benchmarks.gpu                                    # 1.3B shape, Q8_0, 832x480x81
    python -m benchmarks.gpu --model t2v-14b --type Q4_K_M --size 832x480x33
    python -m benchmarks.gpu --device cpu --tiny                # tries the program; its numbers mean nothing

Contenders: ours in each of --precisions with all weights on the device; "travelling", with none of them staying
there; "compiled"; and `diffusers` with GGUFQuantizationConfig in the same 16-bit floats. Weights are random. Every
contender is first run alone for its peak of device memory; then all run in turns, and the device is waited for around
each run. The ceiling is one dense product of a feed-forward layer. Errors are against `diffusers` in float32, for the
transformer where that fits (--exact).

The last line is JSON. Nobody has run this on a GPU yet: docs/performance.md.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import ceilings, peers
from benchmarks.engine import PROMPT_TOKENS, _inputs, _size
from benchmarks.measure import Seconds, in_turns, machine, relative_error
from mutoscope.engine import memory
from mutoscope.engine.compiling import compile_blocks
from mutoscope.engine.devices import has_own_memory, open_device
from mutoscope.engine.linear import default_compute_dtype
from mutoscope.engine.streaming import stream_blocks
from mutoscope.engine.vae import VAEConfig
from mutoscope.engine.wan import WanConfig, rope_table
from mutoscope.engine.weights import load_vae, load_wan
from mutoscope.request import PrecisionName
from scripts.make_random_model import CONFIGS, with_layers, write_random_model

TINY_DIT = WanConfig(
    dim=256, ffn_dim=512, n_heads=2, n_layers=2, in_dim=16, out_dim=16, text_dim=64, freq_dim=32
)
TINY_VAE = VAEConfig(8, 16, (8, 16, 32, 32), 2, (False, True, True))

Run = Callable[[], Tensor]


def main(words: Sequence[str] | None = None) -> dict[str, Any]:
    args = _arguments(words)
    device = open_device(args.device)
    if args.device is None and device.type == "cpu":
        raise SystemExit("There is no GPU here. --device cpu --tiny tries the program without one.")
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        report = {
            "benchmark": "gpu",
            **machine(),
            "device": str(device),
            "card": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
            "tiny": args.tiny,
            "dit": transformer(args.files or Path(folder), device, args),
            "vae": decoder(args.files or Path(folder), device, args),
        }
    print(json.dumps(report))
    return report


def _arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--device", help="default: a GPU")
    parser.add_argument("--model", default="t2v-1.3b", choices=("t2v-1.3b", "t2v-14b"))
    parser.add_argument("--layers", type=int, help="default: all of the model's")
    parser.add_argument("--type", default="Q8_0", help="of the transformer's weights, default %(default)s")
    parser.add_argument("--size", type=_size, help="default: 832x480x81")
    parser.add_argument("--vae-size", type=_size, help="default: 256x256x17, one tile")
    parser.add_argument(
        "--precisions", type=lambda t: t.split(","), default=["auto"], help="like auto,int8,fp8"
    )
    parser.add_argument("--compiled", action="store_true", help="also with torch.compile between products")
    parser.add_argument("--exact", action="store_true", help="errors against diffusers in float32")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--files", type=Path, help="folder where model files are kept and found again")
    parser.add_argument("--tiny", action="store_true", help="a model of some hundred kilobytes")
    args = parser.parse_args(words)
    args.size = args.size or ((64, 32, 5) if args.tiny else (832, 480, 81))
    args.vae_size = args.vae_size or ((32, 32, 5) if args.tiny else (256, 256, 17))
    return args


def transformer(folder: Path, device: torch.device, args: argparse.Namespace) -> dict[str, Any]:
    """One forward for one prompt at noise level 700."""
    config = TINY_DIT if args.tiny else CONFIGS[args.model]
    assert isinstance(config, WanConfig)
    config = with_layers(config, args.layers) if args.layers else config
    path = folder / f"{'tiny' if args.tiny else args.model}-{config.n_layers}-{args.type}.gguf"
    if not path.exists():
        write_random_model(config, path, args.type)
    tokens = memory.n_tokens(*args.size)
    dtype = default_compute_dtype(device)
    x, rows, t = (value.to(device) for value in _inputs(config, args.size))
    rope = rope_table((x.shape[2], x.shape[3] // 2, x.shape[4] // 2), config.head_dim, device=device)
    padded = peers.padded_text(rows)

    def ours(precision: PrecisionName, *, travels: bool = False, compiled: bool = False) -> Run:
        model = load_wan(path, device=device, precision=precision)
        stream = stream_blocks(model, device) if has_own_memory(device) or travels else None
        if stream is not None:
            stream.settle(0 if travels else stream.all_bytes)
        if compiled:
            compile_blocks(model)
        text, level = model.text_context(rows, [PROMPT_TOKENS]), model.time_modulation(t)
        return lambda: model(x, level, text, rope)

    def theirs(dtype: torch.dtype) -> Run:
        peer = peers.load_transformer(path, config, dtype).to(device)
        return lambda: peer(x.to(dtype), t, padded.to(dtype), return_dict=False)[0]

    makers: dict[str, Callable[[], Run]] = {p: (lambda p=p: ours(p)) for p in args.precisions}
    makers["travelling"] = lambda: ours(args.precisions[0], travels=True)
    if args.compiled:
        makers["compiled"] = lambda: ours(args.precisions[0], compiled=True)
    makers["diffusers"] = lambda: theirs(dtype)
    expected = theirs(torch.float32)() if args.exact else None
    ceiling = _ceiling(device, dtype, tokens, config)
    report = _compare(makers, device, args.rounds, expected)
    flops = ceilings.linear_flops(config, tokens) + ceilings.attention_flops(
        config, tokens, PROMPT_TOKENS + 1
    )
    report |= {"case": f"{path.stem}, {'x'.join(map(str, args.size))}", "tokens": tokens, "tflop": flops / 1e12,
               "file_bytes": path.stat().st_size, "ceiling_tflops": ceiling / 1e12}  # fmt: skip
    for row in report["contenders"].values():
        row["share_of_ceiling"] = flops / row["min_s"] / ceiling
    _tell(report)
    return report


def decoder(folder: Path, device: torch.device, args: argparse.Namespace) -> dict[str, Any]:
    """One decode of random latents, whole frames."""
    config = TINY_VAE if args.tiny else CONFIGS["vae"]
    assert isinstance(config, VAEConfig)
    path = folder / f"{'tiny-' if args.tiny else ''}vae-F16.safetensors"
    if not path.exists():
        write_random_model(config, path, "F16")
    width, height, frames = args.vae_size
    dtype = default_compute_dtype(device)
    rng = torch.Generator().manual_seed(0)
    z = torch.randn(1, config.z_dim, (frames + 3) // 4, height // 8, width // 8, generator=rng)
    raw = peers.denormalised(z, config)

    def ours() -> Run:
        vae, latents = load_vae(path, device=device), z.to(device)
        return lambda: vae.decode(latents)

    def theirs(dtype: torch.dtype) -> Run:
        peer, latents = peers.load_vae(path, config, dtype).to(device), raw.to(device, dtype)
        return lambda: peer.decode(latents, return_dict=False)[0]

    expected = theirs(torch.float32)()
    report = _compare({"ours": ours, "diffusers": lambda: theirs(dtype)}, device, args.rounds, expected)
    report["case"] = f"VAE decode, {width}x{height}x{frames}"
    _tell(report)
    return report


def _compare(
    makers: dict[str, Callable[[], Run]], device: torch.device, rounds: int, expected: Tensor | None
) -> dict[str, Any]:
    """Peak memory of each alone, then seconds of all in turns."""
    peaks = {name: _peak(make, device) for name, make in makers.items()}
    runs = {name: make() for name, make in makers.items()}
    errors = {
        name: None if expected is None else relative_error(run(), expected) for name, run in runs.items()
    }
    seconds: dict[str, Seconds] = in_turns(runs, rounds, lambda: _now(device))
    rows = {
        name: {
            **seconds[name].as_json(),
            "diffusers_over_this": seconds["diffusers"].median / seconds[name].median,
            "peak_device_bytes": peaks[name],
            "relative_error": errors[name],
        }
        for name in makers
    }
    return {"contenders": rows, "rounds": rounds}


def _peak(make: Callable[[], Run], device: torch.device) -> int | None:
    """Bytes of torch's allocator at the peak of loading and one run; None where there is no such count."""
    if device.type != "cuda":
        return None
    gc.collect()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    make()()
    torch.cuda.synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    gc.collect()
    return peak


def _now(device: torch.device) -> float:
    """Seconds, when all that was asked of the device is done."""
    if has_own_memory(device):
        torch.get_device_module(device).synchronize(device)
    return time.perf_counter()


def _ceiling(device: torch.device, dtype: torch.dtype, tokens: int, config: WanConfig) -> float:
    """Operations per second of the card's dense product [tokens, D] x [D, ffn], the best of ten."""
    a = torch.randn(tokens, config.dim, device=device, dtype=dtype)
    b = torch.randn(config.ffn_dim, config.dim, device=device, dtype=dtype)
    best = min(in_turns({"product": lambda: a @ b.T}, 10, lambda: _now(device))["product"].rounds)
    return 2.0 * tokens * config.dim * config.ffn_dim / best


def _tell(report: dict[str, Any]) -> None:
    ceiling = f", ceiling {report['ceiling_tflops']:.1f} TFLOP/s" if "ceiling_tflops" in report else ""
    print(f"\n{report['case']}{ceiling}, {report['rounds']} rounds")
    for name, row in report["contenders"].items():
        share = f"  share of ceiling {row['share_of_ceiling']:.2f}" if "share_of_ceiling" in row else ""
        peak = row["peak_device_bytes"]
        print(
            f"  {name:<12} {row['median_s']:8.3f} s ({row['min_s']:.3f} to {row['max_s']:.3f})  diffusers / this "
            f"{row['diffusers_over_this']:.2f}{share}"
            + (f"  peak {peak / memory.GIB:.2f} GiB" if peak is not None else "")
            + (f"  error {row['relative_error']:.4f}" if row["relative_error"] is not None else "")
        )


if __name__ == "__main__":
    main()
