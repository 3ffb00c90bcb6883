"""The engine against `diffusers` and against this machine: one transformer forward and one VAE decode.

    make bench                          # six minutes on two cores, 2 GB of disk while it runs
    python -m benchmarks.engine --quick # one minute: fewer layers, a smaller picture
    python -m benchmarks.engine --only dit --sd-cpp ~/stable-diffusion.cpp/build/bin/sd-cli

Same file, same inputs, same process; contenders run in turns and the warm-up is left out. Both sides compute in
bfloat16 (float32 on processors without it), ours also in the default precision, from GGUF (transformer) and 16-bit
safetensors (VAE) with random weights
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
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

PUBLISHED_LAYERS = 30
PROMPT_TOKENS = 60
SD_CPP = "stable-diffusion.cpp"
VAE_PEERS = ("diffusers", "channels-last")
"""diffusers as its users have it, and with weights in the layout that is faster here."""
QUIET = 1.25
"""Slowest over fastest round of one contender, above which a run is not worth reporting."""
Decode = Callable[[Any], Any]
"""Latents to frames."""


def main() -> None:
    args = _arguments()
    if "OMP_PROC_BIND" not in os.environ:  # read once, when the OpenMP library starts
        os.environ["OMP_PROC_BIND"] = "true"
        os.execv(sys.executable, [sys.executable, "-m", "benchmarks.engine", *sys.argv[1:]])

    import torch

    from benchmarks.measure import machine

    if args.threads:
        torch.set_num_threads(args.threads)
    if args.peak_of:
        print(peak_of(args.peak_of, args))
        return
    report: dict[str, Any] = {"benchmark": "engine", **machine(), "rounds": args.rounds}
    print(f"{report['cpu']}, {report['threads']} threads, torch {report['torch']}, {args.rounds} rounds")
    with ExitStack() as stack, torch.inference_mode():
        folder = args.files or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if args.only in (None, "machine"):
            report["machine"] = machine_ceilings(args.rounds)
        if args.only in (None, "dit"):
            report["dit"] = transformer(folder, args)
        if args.only in (None, "memory"):
            report["peak_bytes"] = peaks(folder, args)
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
    parser.add_argument(
        "--vae-peers",
        type=_peers,
        default=VAE_PEERS,
        help=f"ours against which of {','.join(VAE_PEERS)}, or none",
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--threads", type=int, help="with 1, the processor's time is taken (for busy machines)"
    )
    parser.add_argument("--only", choices=("machine", "dit", "memory", "vae"))
    parser.add_argument(
        "--precisions", type=lambda text: text.split(","), default=["auto", "bf16"], help="default: auto,bf16"
    )
    parser.add_argument(
        "--sd-cpp", type=Path, help="the program of stable-diffusion.cpp, as another contender for `dit`"
    )
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    parser.add_argument("--files", type=Path, help="folder where model files are kept and found again")
    args = parser.parse_args()
    args.size = args.size or ((256, 128, 9) if args.quick else (480, 256, 9))
    args.layers = args.layers or (4 if args.quick else PUBLISHED_LAYERS)
    if args.sd_cpp and args.layers not in (30, 40):
        parser.error(f"--sd-cpp: it runs 30 or 40 layers only, not {args.layers}")
    if args.sd_cpp and not os.access(args.sd_cpp, os.X_OK):
        parser.error(f"--sd-cpp {args.sd_cpp}: is no program")
    args.vae_size = args.vae_size or ((128, 128, 5) if args.quick else (240, 128, 9))
    return args


def _peers(text: str) -> tuple[str, ...]:
    names = () if text == "none" else tuple(text.split(","))
    if unknown := set(names) - set(VAE_PEERS):
        raise argparse.ArgumentTypeError(
            f"{', '.join(sorted(unknown))}: expected some of {','.join(VAE_PEERS)}, or none"
        )
    return names


def _size(text: str) -> tuple[int, int, int]:
    width, height, frames = map(int, text.split("x"))
    if width % 16 or height % 16 or frames % 4 != 1:
        raise argparse.ArgumentTypeError("width and height must be multiples of 16, frames 4n + 1")
    return width, height, frames


MATMUL = (2048, 1536, 8960)
ATTENTION = (8192, 12, 128)
"""Tokens, heads, width of a head."""


def machine_ceilings(rounds: int) -> dict[str, Any]:
    """What the library reaches here, and what our attention makes of it. GFLOP/s; GB/s for copies."""
    import torch
    import torch.nn.functional as F

    from benchmarks import ceilings
    from benchmarks.measure import in_turns
    from mutoscope.engine.attention import attend_in_blocks
    from mutoscope.engine.int8 import int8_is_fast

    tokens, heads, width = ATTENTION
    q, k, v = (torch.randn(1, tokens, heads, width).bfloat16() for _ in range(3))
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if int8_is_fast():
        dtypes["int8"] = torch.int8
    runs: dict[str, Callable[[], object]] = {
        f"matmul {name}": ceilings.matmul(dtype, MATMUL) for name, dtype in dtypes.items()
    }
    work = {name: 2e-9 * MATMUL[0] * MATMUL[1] * MATMUL[2] for name in runs}
    q_, k_, v_ = (t.transpose(1, 2) for t in (q, k, v))
    runs["attention, library, bfloat16"] = lambda: F.scaled_dot_product_attention(q_, k_, v_)
    runs["attention, ours, bfloat16"] = lambda: attend_in_blocks(q, k, v, None, width**-0.5)
    work.update({name: 4e-9 * tokens**2 * heads * width for name in runs if name.startswith("attention")})
    runs["copy"] = ceilings.copy()
    work["copy"] = 2 * (1 << 28) / 1e9
    seconds = in_turns(runs, rounds)
    report = {name: work[name] / min(seconds[name].rounds) for name in runs}
    print("\nThis machine, through the library (GFLOP/s; copy: GB/s)")
    for name, rate in report.items():
        print(f"  {name:<30} {rate:8.0f}")
    share = report["attention, ours, bfloat16"] / report["matmul bfloat16"]
    print(f"  attention at {tokens} tokens: {share:.2f} of the bfloat16 product")
    return {**report, "attention_share": share}


def transformer(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """One forward at noise level 700 for one prompt, batch 1, in each precision."""
    import torch

    from benchmarks import ceilings, peers, sdcpp
    from benchmarks.measure import clock_of_threads, in_turns, relative_error
    from benchmarks.shares import shares
    from mutoscope.engine import pages
    from mutoscope.engine.int8 import int8_is_fast
    from mutoscope.engine.linear import default_compute_dtype
    from mutoscope.engine.memory import n_tokens
    from mutoscope.engine.wan import rope_table
    from mutoscope.engine.weights import load_wan

    pages.reuse_freed()  # as the pipeline does; the peer gets it too
    config, path = _file(folder, args)
    width, height, frames = args.size
    tokens = n_tokens(width, height, frames)
    dtype = default_compute_dtype(torch.device("cpu"))
    x, rows, t = _inputs(config, args.size)
    rope = rope_table((x.shape[2], x.shape[3] // 2, x.shape[4] // 2), config.head_dim)
    padded = peers.padded_text(rows)

    models = {name: load_wan(path, precision=name) for name in args.precisions}
    prepared = {
        name: (model.text_context(rows, [PROMPT_TOKENS]), model.time_modulation(t))
        for name, model in models.items()
    }
    exact = peers.load_transformer(path, config, torch.float32)
    expected = exact(x, t, padded, return_dict=False)[0]
    del exact
    peer = peers.load_transformer(path, config, dtype)

    def ours(name: str) -> Callable[[], torch.Tensor]:
        text, time = prepared[name]
        return lambda: models[name](x, time, text, rope)

    runs: dict[str, Callable[[], Any]] = {name: ours(name) for name in models}
    runs["diffusers"] = lambda: peer(x.to(dtype), t, padded.to(dtype), return_dict=False)[0]
    errors = {name: relative_error(run(), expected) for name, run in runs.items()}
    runs["products"] = ceilings.products_of_blocks(config, tokens, dtype)
    if int8_is_fast():
        runs["integer products"] = ceilings.integer_products_of_blocks(config, tokens)

    def once_per_clip() -> None:
        model = next(iter(models.values()))
        model.text_context(rows, [PROMPT_TOKENS])
        model.time_modulation(t)

    runs["once per clip"] = once_per_clip
    others: dict[str, Callable[[], float]] = {}
    if args.sd_cpp:
        threads = torch.get_num_threads()
        case = sdcpp.StableDiffusionCpp(args.sd_cpp, path, _vae_file(folder), args.size, threads)
        others[SD_CPP] = case.step
    seconds = in_turns(runs, args.rounds, others=others)

    linear = ceilings.linear_flops(config, tokens)
    attention = ceilings.attention_flops(config, tokens, PROMPT_TOKENS + 1)
    rates = {key: linear / min(s.rounds) for key, s in seconds.items() if key.endswith("products")}
    floors = {"products": (linear + attention) / rates["products"]}
    if "integer products" in rates:
        floors["integer products"] = linear / rates["integer products"] + attention / rates["products"]
    report: dict[str, Any] = {
        "case": f"DiT forward, 1.3B shape, {args.layers} layers, {args.type}, {width}x{height}x{frames}",
        "tokens": tokens,
        "layers": args.layers,
        "dtype": str(dtype).removeprefix("torch."),
        "tflop": (linear + attention) / 1e12,
        "gflops": {key: rate / 1e9 for key, rate in rates.items()},
        "floor_s": floors,
        "once_per_clip": seconds["once per clip"].as_json(),
        "diffusers": {**seconds["diffusers"].as_json(), "relative_error": errors["diffusers"]},
    }
    theirs = min(seconds["diffusers"].rounds)
    print(f"\n{report['case']}, {tokens} tokens, {report['tflop']:.2f} TFLOP")
    for key, rate in report["gflops"].items():
        print(f"  {key} of the blocks {rate:.0f} GFLOP/s: floor {floors[key]:.2f} s")
    for name in (*models, "diffusers"):
        row = {**seconds[name].as_json(), "relative_error": errors[name]}
        row["diffusers_over_this"] = seconds["diffusers"].median / row["median_s"]
        row["diffusers_over_this_of_minima"] = theirs / row["min_s"]
        integers = name in ("auto", "int8") and "integer products" in floors
        row["share_of_floor"] = floors["integer products" if integers else "products"] / row["min_s"]
        if SD_CPP in seconds:
            row["sd_cpp_over_this"] = seconds[SD_CPP].median / row["median_s"]
        if name != "diffusers":
            row["shares"] = shares(runs[name], clock_of_threads())
        report[name] = row
        print(
            f"  {name:<10} {row['median_s']:7.2f} s ({row['min_s']:.2f} to {row['max_s']:.2f})  error "
            f"{row['relative_error']:.4f}  diffusers / this {row['diffusers_over_this']:.2f} (of minima "
            f"{row['diffusers_over_this_of_minima']:.2f})"
            + (f"  floor / this {row['share_of_floor']:.2f}" if name not in ("exact", "diffusers") else "")
            + (f"  {SD_CPP} / this {row['sd_cpp_over_this']:.2f}" if "sd_cpp_over_this" in row else "")
        )
        if "shares" in row:
            print("             " + ", ".join(f"{of} {share:.1%}" for of, share in row["shares"].items()))
    if SD_CPP in seconds:
        report[SD_CPP] = seconds[SD_CPP].as_json()
        print(f"  {SD_CPP}, flash attention {seconds[SD_CPP]}")
    report["quiet"] = all(report[n]["max_s"] < QUIET * report[n]["min_s"] for n in (*models, "diffusers"))
    if not report["quiet"]:
        print("  The machine was busy with other things: medians mean little, minima more. Run again.")
    return report


def _file(folder: Path, args: argparse.Namespace) -> tuple[Any, Path]:
    """The configuration and the file of random weights, written if it is not there."""
    from scripts.make_random_model import CONFIGS, with_layers, write_random_model

    config = with_layers(CONFIGS["t2v-1.3b"], args.layers)
    path = folder / f"t2v-1.3b-{args.layers}-{args.type}.gguf"
    if not path.exists():
        write_random_model(config, path, args.type)
    return config, path


def _vae_file(folder: Path) -> Path:
    """A full-size VAE of random weights, written if it is not there."""
    from scripts.make_random_model import CONFIGS, write_random_model

    path = folder / "vae-F16.safetensors"
    if not path.exists():
        write_random_model(CONFIGS["vae"], path, "F16")
    return path


def _inputs(config: Any, size: tuple[int, int, int]) -> tuple[Any, Any, Any]:
    """Seeded noise [1, C, F, H, W], rows of a prompt [1, S, E], and a noise level [1]."""
    import torch

    width, height, frames = size
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(1, config.in_dim, (frames + 3) // 4, height // 8, width // 8, generator=rng)
    return x, torch.randn(1, PROMPT_TOKENS, config.text_dim, generator=rng), torch.tensor([700.0])


def peaks(folder: Path, args: argparse.Namespace) -> dict[str, int]:
    """Peak memory of a process that loads the file and runs one forward, bytes, for each contender."""
    _file(folder, args)
    found = {}
    for name in (*args.precisions, "diffusers"):
        command = [
            sys.executable,
            "-m",
            "benchmarks.engine",
            *sys.argv[1:],
            "--files",
            str(folder),
            "--peak-of",
            name,
        ]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
        found[name] = int(run.stdout.split()[-1])
        print(f"  {name:<10} peak memory {found[name] / (1 << 30):.2f} GiB")
    return found


def peak_of(name: str, args: argparse.Namespace) -> int:
    """Of this process, after one forward of one contender; the pages of the file that are in memory included."""
    import torch

    from benchmarks.measure import peak_resident

    config, path = _file(args.files, args)
    x, rows, t = _inputs(config, args.size)
    with torch.inference_mode():
        if name == "diffusers":
            from benchmarks import peers

            dtype = torch.bfloat16
            peer = peers.load_transformer(path, config, dtype)
            peer(x.to(dtype), t, peers.padded_text(rows).to(dtype), return_dict=False)
        else:
            from mutoscope.engine import pages
            from mutoscope.engine.wan import rope_table
            from mutoscope.engine.weights import load_wan

            pages.reuse_freed()
            model = load_wan(path, precision=name)  # type: ignore[arg-type]
            rope = rope_table((x.shape[2], x.shape[3] // 2, x.shape[4] // 2), config.head_dim)
            model(x, model.time_modulation(t), model.text_context(rows, [PROMPT_TOKENS]), rope)
    return peak_resident()


def decoder(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """One decode of random latents, whole frames, full width; the errors are those of a corner of it."""
    import torch

    from benchmarks import ceilings, peers
    from benchmarks.measure import in_turns, relative_error
    from mutoscope.engine import pages
    from mutoscope.engine.linear import default_compute_dtype
    from mutoscope.engine.weights import load_vae
    from scripts.make_random_model import CONFIGS

    pages.reuse_freed()  # as the pipeline does; the peers get it too
    config, path = CONFIGS["vae"], _vae_file(folder)
    width, height, frames = args.vae_size
    dtype = default_compute_dtype(torch.device("cpu"))
    rng = torch.Generator().manual_seed(0)
    z = torch.randn(1, config.z_dim, (frames + 3) // 4, height // 8, width // 8, generator=rng)
    corner = z[:, :, :2, :16, :16]  # in float32 a whole clip takes longer than all the rest

    def peer_of(dtype: torch.dtype, last: bool = False) -> Decode:
        vae = peers.load_vae(path, config, dtype)
        layout = torch.channels_last_3d if last else torch.preserve_format
        if last:
            peers.channels_last(vae)

        def decode(z: torch.Tensor) -> torch.Tensor:
            raw = peers.denormalised(z, config).to(dtype, memory_format=layout)
            return vae.decode(raw, return_dict=False)[0]

        return decode

    makers: dict[str, Callable[[], Decode]] = {
        "ours": lambda: load_vae(path).decode,
        "diffusers": lambda: peer_of(dtype),
        "channels-last": lambda: peer_of(dtype, last=True),
    }
    decoders = {name: makers[name]() for name in ("ours", *args.vae_peers)}
    expected = peer_of(torch.float32)(corner)
    errors = {name: relative_error(decode(corner), expected) for name, decode in decoders.items()}
    convolutions = ceilings.decoder_convolutions(config, width, height, frames)
    seconds = in_turns({name: partial(decode, z) for name, decode in decoders.items()}, args.rounds)
    alone: dict[Any, Callable[[], object]] = {c: ceilings.runner(c, dtype) for c in convolutions}
    singles = in_turns(alone, args.rounds)
    flops = sum(n * ceilings.convolution_flops(c) for c, n in convolutions.items())
    floor = sum(n * min(singles[c].rounds) for c, n in convolutions.items())
    report: dict[str, Any] = {
        "case": f"VAE decode, full width, {width}x{height}x{frames}",
        "dtype": str(dtype).removeprefix("torch."),
        "tflop": flops / 1e12,
        "ceiling_gflops": flops / floor / 1e9,
        "floor_s": floor,
        "share_of_floor": floor / min(seconds["ours"].rounds),
    }
    print(f"\n{report['case']}, {report['dtype']}, {report['tflop']:.2f} TFLOP")
    print(
        f"  floor          {floor:8.3f} s  at {report['ceiling_gflops']:.0f} GFLOP/s, measured in the same run"
    )
    for name, row in seconds.items():
        # Others on the machine only ever add time, so the minima are compared too.
        ratio = row.median / seconds["ours"].median, min(row.rounds) / min(seconds["ours"].rounds)
        report[name] = {
            **row.as_json(),
            "relative_error": errors[name],
            "over_ours": ratio[0],
            "over_ours_of_minima": ratio[1],
        }
        print(f"  {name:<14} {row}  error {errors[name]:.4f}", end="")
        print(
            f"  floor / ours {report['share_of_floor']:.2f}"
            if name == "ours"
            else f"  this / ours {ratio[0]:.2f} (of minima {ratio[1]:.2f})"
        )
    report["quiet"] = all(max(row.rounds) < QUIET * min(row.rounds) for row in seconds.values())
    if not report["quiet"]:
        print("  The machine was busy with other things; these ratios mean little. Run again.")
    return report


if __name__ == "__main__":
    main()
