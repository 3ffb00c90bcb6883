"""Peak memory of `mutoscope generate`, stage by stage, for clips of growing length and size; and whether promises hold.

    python -m benchmarks.memory --files DIR --layers 2 --sizes 480x256x17,480x256x81 --until denoise   # activations
    python -m benchmarks.memory --files DIR --sizes 480x256x9 --memory 3.5GiB                          # a whole clip
    python -m benchmarks.memory --files DIR --model vace-14b --type Q4_K_M --sizes 480x256x17 --memory 15GiB
    python -m benchmarks.memory --model pocket --memory 700MiB
    python -m benchmarks.memory --files DIR --vae 64x64x5,64x64x17,256x256x13           # decoding alone, a tile each

A fresh process for each clip, its resident memory read from outside (Linux): `all` is the system's own high-water mark
with every page of mapped files, `own` the anonymous part, looked at fifty times a second: what the system cannot take
back. Activations depend on the width of a model and not on its depth, so two layers show them. What the first step
keeps in integers is taken off; the rest is compared with `memory.estimate`. A table, and JSON in the last line.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

GIB = 1 << 30
INTERVAL_S = 0.02


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.memory", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--files", type=Path, help="folder where model files are kept and found again")
    parser.add_argument("--model", default="t2v-1.3b", help="of scripts/make_random_model.py, or pocket")
    parser.add_argument("--type", default="Q8_0")
    parser.add_argument("--layers", type=int, help="of the transformer, fewer than published")
    parser.add_argument("--text-layers", type=int, default=24)
    parser.add_argument(
        "--sizes", default="", help="width x height x frames, by commas; default: the model's"
    )
    parser.add_argument("--memory", help="the promise, like 3.5GiB")
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--steps", type=int, default=1)
    parser.add_argument("--guidance", type=float, default=5.0)
    parser.add_argument(
        "--until", choices=("denoise", "decode"), default="decode", help="the last stage to run"
    )
    parser.add_argument("--vae", default="", help="width x height x frames, by commas, and nothing else")
    args = parser.parse_args()
    if args.vae:
        print(
            json.dumps(
                {"benchmark": "memory", "vae": [decoding(args.files, size) for size in args.vae.split(",")]}
            )
        )
        return

    from benchmarks.measure import machine

    model = "pocket"
    if args.model != "pocket":
        from benchmarks.sets import write_set

        model = str(
            write_set(args.files, args.model, args.type, layers=args.layers, text_layers=args.text_layers)
        )
    report: dict[str, Any] = {"benchmark": "memory", **machine(), **vars(args), "files": None, "clips": []}
    for size in args.sizes.split(",") if args.sizes else [""]:
        options = ["--model", model, "--steps", str(args.steps), "--guidance", str(args.guidance)]
        options += ["--precision", args.precision]
        if size:
            width, height, frames = size.split("x")
            options += ["--size", f"{width}x{height}", "--frames", frames]
        if args.memory:
            options += ["--memory", args.memory]
        clip = watch(options, args.until)
        clip["estimate"] = _estimate(args, size) if size and args.model != "pocket" else {}
        clip["kept"] = _kept_bytes(args) if args.model != "pocket" else 0
        clip["size"] = size
        report["clips"].append(clip)
        stages = ", ".join(
            f"{name} {peak['own'] / GIB:.2f}"
            + (f" (estimate {clip['estimate'][name] / GIB:.2f})" if name in clip["estimate"] else "")
            for name, peak in clip["stages"].items()
        )
        print(
            f"{size or 'default'}: all {clip['all'] / GIB:.2f} GiB, own by stage: {stages}; {clip['seconds']:.0f} s, "
            f"{clip['bytes']} bytes of video",
            flush=True,
        )
    print(table(report["clips"]))
    print(json.dumps(report))


def decoding(folder: Path, size: str) -> dict[str, Any]:
    """Own memory at the peak of one tile's decoding, over what was there before."""
    import torch

    from benchmarks.measure import PeakMemory
    from benchmarks.sets import write_set
    from mutoscope.engine import pages
    from mutoscope.engine.weights import load_vae

    write_set(folder, "t2v-1.3b", "Q8_0", layers=2, text_layers=1)
    width, height, frames = map(int, size.split("x"))
    vae = load_vae(folder / "vae-F16.safetensors")
    pages.reuse_freed()
    with torch.inference_mode():
        for _ in vae.decode_stream(torch.randn(1, 16, 1, 2, 2)):
            pass  # kernels are compiled
        pages.give_back()
        with PeakMemory() as before:
            pass
        with PeakMemory() as peak:
            for _ in vae.decode_stream(torch.randn(1, 16, 1 + frames // 4, height // 8, width // 8)):
                pass
    more = peak.anonymous - before.anonymous
    each = more / (vae.config.base_dim * width * height)
    print(f"{size}: {more / 2**20:.0f} MiB, {each:.0f} bytes per unit of base width and pixel", flush=True)
    return {"size": size, "bytes": more, "per_unit_and_pixel": each}


def table(clips: Sequence[dict[str, Any]]) -> str:
    """Markdown: the peak of all pages, and of own memory less kept weights beside the estimate, in GiB."""
    lines = [
        "| size | all | denoising (estimate) | decoding (estimate) | loaded after | seconds |",
        "|---|---|---|---|---|---|",
    ]
    for clip in clips:
        stages, cells = clip["stages"], []
        for name, kept in (("denoise", clip["kept"]), ("decode", 0)):
            cell = f"{(stages[name]['own'] - kept) / GIB:.2f}" if name in stages else ""
            cells.append(cell + (f" ({clip['estimate'][name] / GIB:.2f})" if clip["estimate"] else ""))
        loaded = stages["text"]["at"] if "text" in stages else 0.0
        lines.append(
            f"| {clip['size'] or 'default'} | {clip['all'] / GIB:.2f} | {cells[0]} | {cells[1]} | {loaded:.1f} s | "
            f"{clip['seconds']:.0f} |"
        )
    return "\n".join(lines)


def watch(options: Sequence[str], until: str) -> dict[str, Any]:
    """Make one clip: peaks in bytes of all and of every stage, and the size of the video."""
    with tempfile.TemporaryDirectory() as folder:
        video = Path(folder, "clip.mp4")
        command = [sys.executable, "-m", "mutoscope", "generate", "a red ball falls", "--json", "--seed", "1"]
        command += [*options, "-o", str(video)]
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert process.stdout is not None
        peaks = _Peaks(process.pid)
        seen = ""
        try:
            for line in process.stdout:
                seen += line
                event = json.loads(line) if line.startswith("{") else {}
                if event.get("event") == "stage":
                    if event["name"] == "decode" and until == "denoise":
                        break
                    peaks.start(event["name"], event["seconds"])
            else:
                if process.wait():
                    raise SystemExit(f"mutoscope ended with {process.returncode}:\n{seen}")
        finally:
            peaks.stop()
            process.kill()
            process.wait()
            process.stdout.close()
        size = video.stat().st_size if video.exists() else 0
        seconds = time.perf_counter() - start
        return {
            "all": peaks.all,
            "stages": peaks.stages,
            "seconds": seconds,
            "bytes": size,
            "log": seen.splitlines(),
        }


class _Peaks:
    """Looks at the memory of a process until it ends."""

    def __init__(self, pid: int) -> None:
        self.status = Path(f"/proc/{pid}/status")
        self.all = 0
        self.stages: dict[str, dict[str, Any]] = {}
        self._stage, self._at = "start", 0.0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def start(self, stage: str, at: float) -> None:
        self._stage, self._at = stage, at

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stopped.wait(INTERVAL_S):
            try:
                told = dict(re.findall(r"(VmHWM|RssAnon|VmRSS):\s+(\d+) kB", self.status.read_text()))
            except (OSError, ProcessLookupError):
                return
            if "VmHWM" not in told:
                continue
            stage = self.stages.setdefault(self._stage, {"own": 0, "all": 0, "at": self._at})
            stage["own"] = max(stage["own"], int(told["RssAnon"]) << 10)
            stage["all"] = max(stage["all"], int(told["VmRSS"]) << 10)
            self.all = max(self.all, int(told["VmHWM"]) << 10)


def _config(args: argparse.Namespace) -> Any:
    from scripts.make_random_model import CONFIGS, with_layers

    return CONFIGS[args.model] if args.layers is None else with_layers(CONFIGS[args.model], args.layers)


def _estimate(args: argparse.Namespace, size: str) -> dict[str, int]:
    """Of `memory.estimate`, bytes by stage."""
    from mutoscope.engine import memory

    width, height, frames = map(int, size.split("x"))
    need = memory.estimate(_config(args), width, height, frames, guided=args.guidance != 1.0)
    return {"denoise": need.denoise, "decode": need.decode}


def _kept_bytes(args: argparse.Namespace) -> int:
    """Of weights that the first step keeps in integers where nothing was promised."""
    from mutoscope.engine.int8 import int8_is_fast

    if args.memory or args.precision not in ("auto", "int8") or not int8_is_fast():
        return 0
    c = _config(args)
    n_blocks = c.n_layers + len(c.vace_layers)
    extra = (len(c.vace_layers) + bool(c.vace_layers)) * c.dim**2  # projections of the side branch
    return int(n_blocks * (6 * c.dim**2 + 2 * c.dim * c.ffn_dim) + extra)


if __name__ == "__main__":
    main()
