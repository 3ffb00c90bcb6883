"""Throw broken files at the GGUF reader: each is read or refused with one GGUFError, fast, in little memory.

    python scripts/fuzz_gguf.py 200000 --seed 1 --keep findings/

A seed is a good file cut into its fields (counts, lengths, names, values, data). Half of the mutations
work on fields (interesting numbers, deleting, doubling, swapping, splicing two seeds), half on bytes.
Every mutation is a function of (seed, number), so a finding can be made again from its number.
The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import struct
import sys
import tempfile
import time
import tracemalloc
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import TypedDict

from mutoscope.engine.gguf import BLOCKS, GGUFFile
from mutoscope.errors import GGUFError

LIMIT_S = 1.0
SPARE_BYTES = 1 << 20  # over and above 64 times the size of the file

Fields = list[bytes]


class Tally(TypedDict):
    inputs: int
    accepted: int
    refused: int
    slowest_ms: float
    peak_kib: int
    findings: list[tuple[int, str]]


def u32(value: int) -> bytes:
    return struct.pack("<I", value)


def u64(value: int) -> bytes:
    return struct.pack("<Q", value)


def text(value: str) -> Fields:
    raw = value.encode()
    return [u64(len(raw)), raw]


def seed(keys: list[Fields], tensors: list[tuple[str, tuple[int, ...], int]], version: int = 3) -> Fields:
    """The fields of a good file; `tensors` are (name, dimensions fastest first, type)."""
    fields = [b"GGUF", u32(version), u64(len(tensors)), u64(len(keys))]
    for key in keys:
        fields += key
    offset, sizes = 0, []
    for name, dims, type_id in tensors:
        fields += [*text(name), u32(len(dims)), *map(u64, dims), u32(type_id), u64(offset)]
        numel = 1
        for n in dims:
            numel *= n
        sizes.append(numel // BLOCKS[type_id].elements * BLOCKS[type_id].nbytes)
        offset += -(-sizes[-1] // 32) * 32
    header = sum(map(len, fields))
    fields.append(bytes(-header % 32))
    for size in sizes:
        fields += [bytes(i % 251 for i in range(size)), bytes(-size % 32)]
    return fields


def array(type_id: int, items: Fields, count: int) -> Fields:
    return [u32(9), u32(type_id), u64(count), *items]


ARCH = [*text("general.architecture"), u32(8), *text("wan")]
SCALARS = [
    [*text(f"n.{i}"), u32(i), bytes(size)] for i, size in enumerate([1, 1, 2, 2, 4, 4, 4, 1]) if i != 7
] + [[*text("yes"), u32(7), b"\1"], [*text("u64"), u32(10), u64(9)], [*text("f64"), u32(12), bytes(8)]]
TOKENS = [*text("tokens"), *array(8, [f for i in range(20) for f in text(f"▁{i}")], 20)]
NUMBERS = [*text("scores"), *array(6, [struct.pack("<8f", *range(8))], 8)]
FLAGS = [*text("flags"), *array(7, [b"\0\1\1"], 3)]
ORIG = [*text("comfy.gguf.orig_shape.w"), *array(5, [u32(8), u32(4)], 2)]
ALIGN = [*text("general.alignment"), u32(4), u32(32)]

SEEDS: tuple[Fields, ...] = (
    seed([], []),
    seed([ARCH], [("a", (4,), 0)]),
    seed([ARCH, *SCALARS], [("a", (4, 2), 1), ("b", (256,), 12), ("c", (), 0)], version=2),
    seed([TOKENS, NUMBERS, FLAGS], [("token_embd.weight", (32, 3), 8)]),
    seed(
        [ALIGN, ORIG, ARCH],
        [("w", (32,), 8), ("p", (2, 2, 1, 3, 2), 0), ("q", (512, 2), 14), ("v", (7,), 30)],
    ),
)

EDGES = [
    0,
    1,
    2,
    3,
    7,
    8,
    9,
    31,
    32,
    33,
    255,
    256,
    2**16,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**32,
    2**62,
    2**63,
    2**64 - 1,
]
SMALL = [n for n in EDGES if n < 2**32]


def mutate(rng: random.Random) -> bytes:
    """One broken file (a few are still good)."""
    fields = list(rng.choice(SEEDS))
    if rng.random() < 0.5:
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            mutate_fields(rng, fields)
        return b"".join(fields)
    raw = bytearray(b"".join(fields))
    for _ in range(rng.choice((1, 1, 2, 4, 8))):
        mutate_bytes(rng, raw)
    return bytes(raw)


def mutate_fields(rng: random.Random, fields: Fields) -> None:
    at = rng.randrange(len(fields))
    numbers = [i for i, field in enumerate(fields) if len(field) in (4, 8)]
    match rng.randrange(8):
        case 0 | 1 | 2 if numbers:  # a number becomes another one
            at = rng.choice(numbers)
            if len(fields[at]) == 4:
                fields[at] = u32(rng.choice([*SMALL, rng.randrange(64)]))
            elif rng.random() < 0.4:
                (old,) = struct.unpack("<Q", fields[at])
                fields[at] = u64((old + rng.choice((-32, -1, 1, 32))) % 2**64)
            else:
                fields[at] = u64(rng.choice(EDGES))
        case 3:
            del fields[at]
        case 4:
            fields.insert(at, fields[at])
        case 5:
            other = rng.randrange(len(fields))
            fields[at], fields[other] = fields[other], fields[at]
        case 6:  # one file's head, another's tail
            tail = rng.choice(SEEDS)
            fields[at:] = tail[rng.randrange(len(tail)) :]
        case 7:
            fields[at] = rng.randbytes(rng.choice((len(fields[at]), rng.randrange(40))))
    if not fields:
        fields.append(b"GGUF")


def mutate_bytes(rng: random.Random, raw: bytearray) -> None:
    at = rng.randrange(len(raw)) if raw else 0
    match rng.randrange(6):
        case 0 if raw:
            raw[at] ^= 1 << rng.randrange(8)
        case 1 if raw:
            raw[at] = rng.randrange(256)
        case 2:
            raw[at:at] = rng.randbytes(rng.randrange(1, 16))
        case 3:
            del raw[at : at + rng.randrange(1, 16)]
        case 4:
            del raw[at:]
        case 5:
            new = rng.choice((u32(rng.choice(SMALL)), u64(rng.choice(EDGES))))
            raw[at : at + len(new)] = new


def check(raw: bytes, path: Path) -> str:
    """'accepted' or 'refused'; anything else is a finding and says what happened."""
    path.unlink(missing_ok=True)  # rewriting a file in place makes some file systems wait for the disk
    path.write_bytes(raw)
    try:
        with GGUFFile(path) as file:
            return read_everything(file)
    except GGUFError as error:
        return "refused" if path.name in error.message and error.hint else f"unclear: {error}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def read_everything(file: GGUFFile) -> str:
    for key in file.metadata:
        _ = file.metadata[key]
        _ = file.metadata.encoded(key)
    for name, info in file.tensors.items():
        if len(file.data(name)) != info.nbytes or info.offset % file.alignment:
            return f"wrong place: {info}"
        if info.numel // BLOCKS[info.type_id].elements * BLOCKS[info.type_id].nbytes != info.nbytes:
            return f"wrong size: {info}"
    for a, b in pairwise(sorted(file.tensors.values(), key=lambda info: info.offset)):
        if a.offset + a.nbytes > b.offset:
            return f"overlap: {a} {b}"
    return "accepted"


def run(n_inputs: int, *, seed: int, folder: Path, keep: Path | None = None) -> Tally:
    """Check `n_inputs` mutations; findings are (number, what happened), saved under `keep` if given."""
    tally = Tally(inputs=n_inputs, accepted=0, refused=0, slowest_ms=0.0, peak_kib=0, findings=[])
    previous = signal.signal(signal.SIGALRM, _give_up)
    tracemalloc.start()
    try:
        for number in range(n_inputs):
            raw = mutate(random.Random(f"{seed}:{number}"))
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            signal.setitimer(signal.ITIMER_REAL, 5 * LIMIT_S)
            start = time.perf_counter()
            outcome = check(raw, folder / "fuzz.gguf")
            took_s = time.perf_counter() - start
            signal.setitimer(signal.ITIMER_REAL, 0)
            peak = tracemalloc.get_traced_memory()[1] - before
            if outcome in ("accepted", "refused") and took_s > LIMIT_S:
                outcome = f"slow: {took_s:.1f} s"
            if outcome in ("accepted", "refused") and peak > 64 * len(raw) + SPARE_BYTES:
                outcome = f"memory: {peak} bytes for a file of {len(raw)}"
            tally["slowest_ms"] = max(tally["slowest_ms"], round(1000 * took_s, 1))
            tally["peak_kib"] = max(tally["peak_kib"], peak >> 10)
            if outcome == "accepted":
                tally["accepted"] += 1
            elif outcome == "refused":
                tally["refused"] += 1
            else:
                tally["findings"].append((number, outcome))
                if keep:
                    (keep / f"{seed}-{number}.gguf").write_bytes(raw)
    finally:
        tracemalloc.stop()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    return tally


def _give_up(signum: int, frame: FrameType | None) -> None:
    raise TimeoutError(f"more than {5 * LIMIT_S} s")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("n_inputs", type=int, nargs="?", default=200_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", type=Path, help="folder for inputs that misbehave")
    args = parser.parse_args()
    if args.keep:
        args.keep.mkdir(parents=True, exist_ok=True)
    shared = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shared if shared.is_dir() else None) as folder:
        start = time.perf_counter()
        tally = run(args.n_inputs, seed=args.seed, folder=Path(folder), keep=args.keep)
    seconds = time.perf_counter() - start
    print(json.dumps({**tally, "seed": args.seed, "inputs_per_s": round(args.n_inputs / seconds)}))
    return 1 if tally["findings"] else 0


if __name__ == "__main__":
    sys.exit(main())
