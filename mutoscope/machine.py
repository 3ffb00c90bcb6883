"""What this machine has and how fast it is. Imports torch only where it must be asked."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import time
import urllib.request
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal
from urllib.error import HTTPError, URLError

import psutil

from mutoscope import __version__
from mutoscope.catalog import ModelSet, installed_models, known_models
from mutoscope.manifest import ModelManifest

CPU_FEATURES = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "bf16")
"""Flags of /proc/cpuinfo that decide which arithmetic is fast."""
LIBRARIES = ("torch", "av", "numpy", "huggingface_hub", "tokenizers")
ENCODERS = {"libx264": ".mp4", "libvpx-vp9": ".webm", "gif": ".gif"}
MATMUL_SIZE = 1024
MATMUL_SECONDS = 0.4
LOW_DISK_BYTES = 20_000_000_000
ONLINE_TIMEOUT_S = 3.0

Fit = Literal["yes", "tight", "no"]


@dataclass(frozen=True)
class Problem:
    """Something that does not work (`severe`) or could be better, and what to do."""

    text: str
    todo: str
    severe: bool = False


SMALL_MODEL_BYTES = 256 * 2**20


def use_threads(manifest: ModelManifest, most: int) -> None:
    """Let torch use as many threads of this process as help this model on a CPU, at most `most`.

    A small model's operations are so short that threads mostly wait for each other. With two threads on two free cores
    the starter is a third faster than with one, but as soon as anything else runs it is 4 to 40 times slower.
    """
    import torch

    small = manifest.files.dit.path.stat().st_size < SMALL_MODEL_BYTES
    torch.set_num_threads(1 if small else most)


# -- what fits -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Memory:
    """Of the GPU if there is one, else of the machine."""

    where: str
    total_bytes: int
    available_bytes: int

    def fit(self, needed_bytes: int) -> Fit:
        """yes: now; tight: if other programs make room; no: it would run from disk, slowly, or not at all."""
        if needed_bytes <= self.available_bytes:
            return "yes"
        return "tight" if needed_bytes <= self.total_bytes else "no"


def memory() -> Memory:
    """Where models would run by default. torch is only asked if a GPU seems to be here."""
    if shutil.which("nvidia-smi"):
        import torch

        if torch.cuda.is_available():
            free, total = torch.cuda.mem_get_info()
            return Memory(torch.cuda.get_device_name(), total, free)
    ram = psutil.virtual_memory()
    return Memory("memory", ram.total, ram.available)


def free_disk(folder: Path) -> int:
    """Bytes free where a folder is or will be."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def largest_fitting(models: Iterable[ModelSet], available: Memory) -> list[ModelSet]:
    """For each family the largest set that fits now."""
    best: dict[str, ModelSet] = {}
    for model in models:
        family = model.name.partition(":")[0]
        if available.fit(model.memory_bytes()) == "yes" and (
            family not in best or model.memory_bytes() > best[family].memory_bytes()
        ):
            best[family] = model
    return list(best.values())


# -- examination ---------------------------------------------------------------------------------------------


def examine(models_dir: Path, *, online: bool = False) -> dict[str, Any]:
    """Everything that `mutoscope doctor` tells, ready for JSON. Takes about two seconds."""
    ram, have = psutil.virtual_memory(), memory()
    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    return {
        "mutoscope": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(terse=True),
        "libraries": {name: _version(name) for name in LIBRARIES},
        "cpu": _cpu(),
        "devices": _devices(),
        "memory": {"total_bytes": ram.total, "available_bytes": ram.available},
        "disk": {"models_dir": str(models_dir), "free_bytes": free_disk(models_dir)},
        "installed": [{"name": m.name, "problem": m.problem} for m in installed_models(models_dir)],
        "encoders": {name: _has_encoder(name) for name in ENCODERS},
        "endpoint": {"url": endpoint, "reachable": _reachable(endpoint) if online else None},
        "fits": [m.name for m in largest_fitting(known_models(), have)],
        "gflops": speed(),
    }


def problems(report: dict[str, Any]) -> list[Problem]:
    """What to do about a report, the severe ones first."""
    found = []

    def add(condition: bool, text: str, todo: str, *, severe: bool = False) -> None:
        if condition:
            found.append(Problem(text, todo, severe))

    for name, extension in ENCODERS.items():
        add(
            not report["encoders"][name],
            f"PyAV cannot write {extension} here ({name} is missing).",
            "Install it with its codecs: pip install --force-reinstall --only-binary :all: av",
            severe=name == "libx264",
        )
    for model in report["installed"]:
        add(
            bool(model["problem"]),
            f"The model {model['name']} cannot be used: {model['problem']}",
            f"Remove it (mutoscope models remove {model['name']}) and pull it again.",
        )
    add(
        report["disk"]["free_bytes"] < LOW_DISK_BYTES,
        f"{report['disk']['free_bytes'] / 1e9:.1f} GB are free for models; most take 6 to 25 GB.",
        "Set MUTOSCOPE_HOME to a folder on a larger disk.",
    )
    add(
        not report["fits"],
        "None of the known models fits in the free memory; the starter does.",
        "Close other programs, or take a machine with 8 GB or more.",
    )
    add(
        report["endpoint"]["reachable"] is False,
        f"{report['endpoint']['url']} cannot be reached.",
        "Installed models work offline. To pull, check the network or set HF_ENDPOINT to a mirror.",
    )
    add(
        len(report["devices"]) == 1,
        f"There is no GPU. The CPU's {max(report['gflops'].values()):.0f} GFLOP/s are enough for the starter, "
        "while the large models take hours for a clip.",
        "Start with --quality draft, a small --size and few --frames.",
    )
    return sorted(found, key=lambda p: not p.severe)


def speed(device: str = "cpu") -> dict[str, float]:
    """Matrix products of 1024 x 1024 in GFLOP/s, the best of what fits in a moment."""
    import torch

    rates = {}
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.ones(MATMUL_SIZE, MATMUL_SIZE, dtype=dtype, device=device)
        best = float("inf")
        end = time.perf_counter() + MATMUL_SECONDS
        a @ a  # the first call sets things up
        while True:
            start = time.perf_counter()
            a @ a
            now = time.perf_counter()
            best = min(best, now - start)
            if now > end:
                break
        rates[str(dtype).removeprefix("torch.")] = round(2 * MATMUL_SIZE**3 / best / 1e9, 1)
    return rates


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _cpu() -> dict[str, Any]:
    import torch

    flags: set[str] = set()
    name = platform.processor() or platform.machine()
    if sys.platform == "linux":
        for line in Path("/proc/cpuinfo").read_text(errors="replace").splitlines():
            key, _, value = line.partition(":")
            if key.strip() in ("flags", "Features"):
                flags.update(value.split())
            elif key.strip() == "model name":
                name = value.strip()
    return {
        "name": name,
        "cores": psutil.cpu_count(logical=False) or os.cpu_count(),
        "threads": torch.get_num_threads(),
        "features": [f for f in CPU_FEATURES if f in flags],
    }


def _devices() -> list[dict[str, Any]]:
    import torch

    found: list[dict[str, Any]] = [{"device": "cpu"}]
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        free, total = torch.cuda.mem_get_info(i)
        found.append({"device": f"cuda:{i}", "name": torch.cuda.get_device_name(i),
                      "total_bytes": total, "available_bytes": free})  # fmt: skip
    if torch.backends.mps.is_available():
        found.append({"device": "mps"})
    return found


def _has_encoder(name: str) -> bool:
    import av.codec

    try:
        av.codec.Codec(name, "w")
    except ValueError:  # av.codec.codec.UnknownCodecError
        return False
    return True


def _reachable(url: str) -> bool:
    request = urllib.request.Request(url, method="HEAD", headers={"User-Agent": f"mutoscope/{__version__}"})
    try:
        with urllib.request.urlopen(request, timeout=ONLINE_TIMEOUT_S):
            return True
    except HTTPError:
        return True  # it answered
    except (URLError, OSError, ValueError):
        return False
