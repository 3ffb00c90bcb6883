"""Clocks, rates and memory for benchmarks.

Machines are shared and their speed drifts, by a factor of two within hours. So everything that is compared is run in
turns, round after round, and only ratios of one run are results.
"""

from __future__ import annotations

import re
import statistics
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor


@dataclass(frozen=True)
class Seconds:
    """Times of one contender."""

    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.rounds)

    def __str__(self) -> str:
        return f"{self.median:8.3f} s  ({min(self.rounds):.3f} to {max(self.rounds):.3f})"

    def as_json(self) -> dict[str, float]:
        return {"median_s": self.median, "min_s": min(self.rounds), "max_s": max(self.rounds)}


def clock_of_threads() -> Callable[[], float]:
    """The wall's; with one thread the processor's, which others on the machine disturb less."""
    return time.process_time if torch.get_num_threads() == 1 else time.perf_counter


def in_turns(
    contenders: Mapping[str, Callable[[], object]],
    rounds: int,
    clock: Callable[[], float] | None = None,
    others: Mapping[str, Callable[[], float]] | None = None,
) -> dict[str, Seconds]:
    """Run all contenders `rounds` times after one warm-up each, starting every round with another one.

    The clock is that of `clock_of_threads` unless given.
    others: contenders that warm up by themselves and return seconds of their own.
    """
    clock = clock or clock_of_threads()
    others = others or {}
    for run in contenders.values():
        run()
    names = [*contenders, *others]
    times: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds):
        k = i % len(names)
        for name in names[k:] + names[:k]:
            if name in others:
                times[name].append(others[name]())
                continue
            start = clock()
            contenders[name]()
            times[name].append(clock() - start)
    return {name: Seconds(tuple(t)) for name, t in times.items()}


def relative_error(got: Tensor, expected: Tensor) -> float:
    """L2 norm of the difference over that of the expected."""
    return ((got.double() - expected.double()).norm() / expected.double().norm()).item()


def cpu_name() -> str:
    try:
        info = Path("/proc/cpuinfo").read_text()
    except OSError:
        return "unknown CPU"
    found = re.search(r"model name\s*:\s*(.+)", info)
    return found[1] if found else "unknown CPU"


def machine() -> dict[str, object]:
    """What the numbers depend on."""
    return {"cpu": cpu_name(), "threads": torch.get_num_threads(), "torch": torch.__version__}


def peak_resident() -> int:
    """Peak bytes of this program; `ru_maxrss` begins with what the parent had when it forked. Linux only."""
    status = Path("/proc/self/status").read_text()
    return int(re.findall(r"VmHWM:\s+(\d+) kB", status)[0]) << 10


class PeakMemory:
    """Peak of the resident memory of this process, by kind, while the block runs. Linux only.

    Anonymous pages are what the process needs; file pages are weights in the page cache that the system can drop.

        with PeakMemory() as peak:
            ...
        peak.anonymous, peak.file, peak.total          # bytes
    """

    INTERVAL_S = 0.02

    def __init__(self) -> None:
        self.anonymous = self.file = self.total = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._stop.wait(self.INTERVAL_S):
            self._look()

    def _look(self) -> None:
        status = Path("/proc/self/status").read_text()
        anonymous, file = (
            int(re.findall(rf"{key}:\s+(\d+) kB", status)[0]) << 10 for key in ("RssAnon", "RssFile")
        )
        self.anonymous = max(self.anonymous, anonymous)
        self.file = max(self.file, file)
        self.total = max(self.total, anonymous + file)

    def __enter__(self) -> PeakMemory:
        self._look()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._look()
