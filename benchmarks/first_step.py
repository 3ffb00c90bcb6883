"""Seconds from the call of `mutoscope generate` to the start of its first denoising step, in fresh processes.

    python -m benchmarks.first_step --files DIR                    # T2V-1.3B Q8_0 and a full-size text encoder: 8 GB
    python -m benchmarks.first_step --files DIR --old PATH         # in turns with another checkout of this repository

Files are of random weights, written if they are not there, and in the page cache: a first, uncounted call reads
them. The clock starts before the process does and stops at its "denoise" event, which comes when everything is
prepared. Cases: nothing on disk from earlier calls (text encoder runs for both prompts); the negative prompt on disk
from an earlier call; and `--help`. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

CALL = (
    "-m",
    "mutoscope",
    "generate",
    "a red ball falls and bounces on a gray background",
    "--json",
    "--steps",
    "1",
)
HERE = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.first_step", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument(
        "--files", type=Path, required=True, help="folder where model files are kept and found again"
    )
    parser.add_argument(
        "--text-layers", type=int, default=24, help="of the text encoder, 24 in the published one"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--old", type=Path, help="another checkout, as a contender")
    args = parser.parse_args()

    from benchmarks.measure import machine
    from benchmarks.sets import write_set

    toml = write_set(args.files, "t2v-1.3b", "Q8_0", text_layers=args.text_layers)
    report: dict[str, Any] = {"benchmark": "first_step", **machine(), "rounds": args.rounds}
    with tempfile.TemporaryDirectory() as folder:
        runs = {"nothing kept": (HERE, toml, "off"), "negative prompt kept": (HERE, toml, folder)}
        if args.old:
            runs["the other checkout"] = (args.old.resolve(), toml, "off")
        for run in runs.values():  # pages come into the cache, prompts onto the disk
            first_step(*run)
        seconds: dict[str, list[float]] = {name: [] for name in [*runs, "--help"]}
        for _ in range(args.rounds):
            for name, run in runs.items():
                seconds[name].append(first_step(*run))
                print(f"    {name}: {seconds[name][-1]:.2f} s", flush=True)
            seconds["--help"].append(help_seconds())
    print(f"{report['cpu']}, {report['threads']} threads, {args.rounds} rounds, {toml.stem}")
    for name, taken in seconds.items():
        print(f"  {name:<30} {statistics.median(taken):6.2f} s  ({min(taken):.2f} to {max(taken):.2f})")
        report[name] = {"median_s": statistics.median(taken), "min_s": min(taken), "max_s": max(taken)}
    print(json.dumps(report))


def first_step(checkout: Path, toml: Path, cache: str) -> float:
    """Seconds until the "denoise" stage is reported; the process is ended then."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, *CALL, "--model", str(toml), "-o", str(Path(folder, "clip.mp4"))]
        command += ["--size", "480x256", "--frames", "9"]
        start = time.perf_counter()
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=folder,
            env=_environment(checkout, cache),
        )
        assert process.stdout is not None
        seen = ""
        try:
            for line in process.stdout:
                seen += line
                if line.startswith("{") and json.loads(line).get("name") == "denoise":
                    return time.perf_counter() - start
        finally:
            process.kill()
            process.wait()
            process.stdout.close()
    raise SystemExit(f"mutoscope ended with {process.returncode} before its first step:\n{seen}")


def help_seconds() -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "mutoscope", "--help"], stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - start


def _environment(checkout: Path, cache: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(checkout), "MUTOSCOPE_CACHE": cache}


if __name__ == "__main__":
    main()
