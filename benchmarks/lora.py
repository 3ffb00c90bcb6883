"""What LoRAs cost: one transformer forward without, with one, and with several, in turns.

    python -m benchmarks.lora                      # 1.3B shape, 6 layers, 1,440 tokens, rank 64: a minute
    python -m benchmarks.lora --layers 30 --size 832x480x17 --rank 32 --several 4

The LoRAs change every linear layer of every block, as the community's usually do (self- and cross-attention and
feed-forward), with random values; so is the model. "Swap" is what attaching takes, from the mapped file. The last
line is JSON. Threads are bound to cores (see benchmarks/engine.py).

On a busy machine give `--threads 1`: then seconds of the processor are measured, which others take no part in.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PROMPT_TOKENS = 60
LAYERS = ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "cross_attn.q", "cross_attn.k",
          "cross_attn.v", "cross_attn.o", "ffn.0", "ffn.2")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.lora", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--layers", type=int, default=6, help="of 30, default %(default)s")
    parser.add_argument("--size", default="480x256x9", help="default %(default)s: 1,440 tokens")
    parser.add_argument("--type", default="Q8_0", help="of the weights, default %(default)s")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--several", type=int, default=2, help="default %(default)s")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--precision", default="auto", choices=("auto", "exact", "bf16", "int8"))
    parser.add_argument("--threads", type=int)
    parser.add_argument("--files", type=Path, help="folder where model files are kept and found again")
    args = parser.parse_args()
    if "OMP_PROC_BIND" not in os.environ:  # read once, when the OpenMP library starts
        os.environ["OMP_PROC_BIND"] = "true"
        os.execv(sys.executable, [sys.executable, "-m", "benchmarks.lora", *sys.argv[1:]])
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measure(args, args.files or Path(folder), Path(folder))))


def write_lora(path: Path, config: Any, rank: int, seed: int) -> None:
    """A file as ComfyUI's trainers write it."""
    import torch
    from safetensors.torch import save_file

    rng = torch.Generator().manual_seed(seed)
    tensors = {}
    for i in range(config.n_layers):
        for name in LAYERS:
            k = config.ffn_dim if name == "ffn.2" else config.dim
            n = config.ffn_dim if name == "ffn.0" else config.dim
            stem = f"diffusion_model.blocks.{i}.{name}"
            tensors[f"{stem}.lora_down.weight"] = (torch.randn(rank, k, generator=rng) / k**0.5).bfloat16()
            tensors[f"{stem}.lora_up.weight"] = (0.01 * torch.randn(n, rank, generator=rng)).bfloat16()
            tensors[f"{stem}.alpha"] = torch.tensor(float(rank))
    save_file(tensors, path)


def measure(args: argparse.Namespace, models: Path, folder: Path) -> dict[str, Any]:
    import torch

    if args.threads:
        torch.set_num_threads(args.threads)
    clock = time.process_time if args.threads == 1 else time.perf_counter

    from benchmarks.measure import machine, relative_error
    from mutoscope.engine import pages
    from mutoscope.engine.lora import Attached
    from mutoscope.engine.memory import n_tokens
    from mutoscope.engine.wan import rope_table
    from mutoscope.engine.weights import load_wan
    from scripts.make_random_model import CONFIGS, with_layers, write_random_model

    config = with_layers(CONFIGS["t2v-1.3b"], args.layers)
    path = models / f"t2v-1.3b-{args.layers}-{args.type}.gguf"
    if not path.exists():
        write_random_model(config, path, args.type)
    files = [folder / f"{i}.safetensors" for i in range(args.several)]
    for seed, file in enumerate(files):
        write_lora(file, config, args.rank, seed)
    width, height, frames = map(int, args.size.split("x"))
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(1, config.in_dim, (frames + 3) // 4, height // 8, width // 8, generator=rng)
    rows = torch.randn(1, PROMPT_TOKENS, config.text_dim, generator=rng)
    cases = {"none": 0, "one": 1, f"{args.several}": args.several}
    times: dict[str, list[float]] = {name: [] for name in cases}
    swaps, outputs = [], {}
    pages.reuse_freed()
    with torch.inference_mode():
        model, state = load_wan(path, precision=args.precision), Attached()
        rope = rope_table((x.shape[2], x.shape[3] // 2, x.shape[4] // 2), config.head_dim)
        timing = model.time_modulation(torch.tensor([700.0]))
        loras = state.open(model, [(file, 0.7) for file in files])
        for turn in range(args.rounds + 1):
            k = turn % len(cases)
            for name in [*cases][k:] + [*cases][:k]:
                n = cases[name]
                start = time.perf_counter()
                state.attach(model, loras[:n])
                swaps.append((time.perf_counter() - start) / max(n, 1))
                text = model.text_context(rows, [PROMPT_TOKENS])
                start = clock()
                outputs[name] = model(x, timing, text, rope)
                if turn:  # the first is a warm-up
                    times[name].append(clock() - start)
    ratios = {
        name: sorted(t / base for t, base in zip(rounds, times["none"], strict=True))
        for name, rounds in times.items()
        if name != "none"
    }
    tokens = n_tokens(width, height, frames)
    print(
        f"1.3B shape, {args.layers} layers, {args.type}, {tokens} tokens, rank {args.rank}, {args.precision}"
    )
    for name, rounds in times.items():
        line = (
            f"  {name:<5} LoRA  median {sorted(rounds)[len(rounds) // 2]:.3f} s, fastest {min(rounds):.3f} s"
        )
        if name in ratios:
            r = ratios[name]
            least = min(rounds) / min(times["none"])
            line += f"; over none: {r[len(r) // 2]:.3f} ({r[0]:.3f}-{r[-1]:.3f}), of the fastest {least:.3f}"
        print(line)
    changed = relative_error(outputs["one"], outputs["none"])
    print(
        f"  they change the answer by {changed:.2f}; a swap takes {min(swaps[1:]):.2f} to {max(swaps):.2f} s"
    )
    return {
        "benchmark": "lora", **machine(), "layers": args.layers, "tokens": tokens, "rank": args.rank,
        "type": args.type, "precision": args.precision, "seconds": times,
        "ratio_of_medians": {k: r[len(r) // 2] for k, r in ratios.items()},
        "ratio_of_minima": {k: min(times[k]) / min(times["none"]) for k in ratios},
    }  # fmt: skip


if __name__ == "__main__":
    main()
