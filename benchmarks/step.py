"""One guided denoising step of a transformer file: seconds and memory, against what `memory.estimate` says.

    python -m benchmarks.step vace-14b-Q4_K_M.gguf --size 256x256x5

For files that exist; `scripts/make_random_model.py` writes one of any size. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

from benchmarks.measure import PeakMemory, machine
from mutoscope.engine import memory
from mutoscope.engine.precision import PRECISIONS
from mutoscope.engine.vae import SPATIAL_STRIDE, TEMPORAL_STRIDE
from mutoscope.engine.wan import rope_table
from mutoscope.engine.weights import load_wan

PROMPT_TOKENS, NEGATIVE_TOKENS = 40, 120


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("path", type=Path)
    parser.add_argument("--size", default="256x256x5", help="width x height x frames, default: %(default)s")
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--precision", choices=PRECISIONS, default="auto")
    args = parser.parse_args()
    width, height, frames = map(int, args.size.split("x"))
    torch.manual_seed(0)
    with PeakMemory() as peak, torch.inference_mode():
        start = time.perf_counter()
        model = load_wan(args.path, precision=args.precision)
        config = model.config
        loaded = time.perf_counter()
        shape = (1 + (frames - 1) // TEMPORAL_STRIDE, height // SPATIAL_STRIDE, width // SPATIAL_STRIDE)
        n_tokens = memory.n_tokens(width, height, frames)
        lengths = [PROMPT_TOKENS, NEGATIVE_TOKENS]
        text = model.text_context(torch.randn(2, max(lengths), config.text_dim), lengths)
        vace = None
        if config.vace_layers:
            vace = model.vace_tokens(torch.randn(1, config.vace_in_dim, *shape))
        x = torch.randn(1, config.in_dim, *shape)
        modulation = model.time_modulation(torch.tensor([900.0]))
        rope = rope_table((shape[0], shape[1] // 2, shape[2] // 2), config.head_dim)
        steps = []
        prepared = time.perf_counter()
        for _ in range(args.steps):
            before = time.perf_counter()
            if n_tokens <= memory.BATCHED_GUIDANCE_TOKENS:
                side = None if vace is None else vace.expand(2, -1, -1)
                v = model(x.expand(2, -1, -1, -1, -1), modulation, text, rope, side)
            else:
                v = torch.cat([model(x, modulation, text.slice(b, b + 1), rope, vace) for b in range(2)])
            steps.append(time.perf_counter() - before)
    assert v.isfinite().all()
    need = memory.estimate(config, width, height, frames)
    file_bytes = args.path.stat().st_size
    print(f"{args.path.name}: {file_bytes / 1e9:.2f} GB, {args.size}, {n_tokens} tokens, guided")
    print(
        f"load {loaded - start:.2f} s, prompt {prepared - loaded:.1f} s, steps {[round(s, 1) for s in steps]} s"
    )
    print(
        f"anonymous {peak.anonymous / 1e9:.2f} GB (estimate {need.denoise / 1e9:.2f}), file {peak.file / 1e9:.2f} GB"
    )
    report = {
        "benchmark": "step",
        **machine(),
        "file_bytes": file_bytes,
        "size": args.size,
        "tokens": n_tokens,
        "load_s": loaded - start,
        "prompt_s": prepared - loaded,
        "steps_s": steps,
        "anonymous_bytes": peak.anonymous,
        "file_peak_bytes": peak.file,
        "rss_peak_bytes": peak.total,
        "estimate_bytes": need.denoise,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
