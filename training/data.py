"""Rendered clips on disk: shards of frames, captions and attributes, made once and memory-mapped by the trainers.

    python -m training.data runs/data --level full --clips 24576 --images 65536
    python -m training.data runs/data/wide --level full --clips 2048 --images 0 --size 112 64

A shard is a folder: `frames.npy` uint8 [N, F, H, W, 3], `masks.npy` uint8 [N, F, H/8, W/8] (share of each 8 x 8 cell
that is object, 0..255) and `captions.json` with three captions and the attribute classes of each clip. Clips also have
what VACE tasks need: `boxes.npy` float16 [N, F, 4] (the first object's box, fractions of the frame), `portraits.npy`
uint8 [N, H, W, 3] (that object on white) and `unnamed.json` (captions that leave the object to the picture).
"""

from __future__ import annotations

import argparse
import json
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from training import captions, world

SHARD = 2048
CAPTIONS_PER_CLIP = 3


def make_shard(folder: Path, seed: int, *, level: str, n: int, frames: int, size: tuple[int, int]) -> Path:
    """Render one shard. `size` is (width, height) in pixels. A finished shard is left alone."""
    if (folder / "captions.json").exists():
        return add_task_inputs(folder, seed, level=level, n=n, frames=frames, size=size)
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    width, height = size
    clips = np.lib.format.open_memmap(
        folder / "frames.npy", mode="w+", dtype=np.uint8, shape=(n, frames, height, width, 3)
    )
    cells = np.zeros((n, frames, height // 8, width // 8), np.uint8)
    texts, classes = [], []
    for i in range(n):
        scene = world.sample(rng, level=level, width=width, height=height, frames=frames)
        clips[i] = world.render(scene)
        mask = world.object_masks(scene).max(axis=0)
        cells[i] = mask.reshape(frames, height // 8, 8, width // 8, 8).mean(axis=(2, 4)) * 255
        texts.append([captions.caption(scene, rng) for _ in range(CAPTIONS_PER_CLIP)])
        classes.append(list(captions.attributes(scene).values()))
    clips.flush()
    np.save(folder / "masks.npy", cells)
    (folder / "captions.json").write_text(json.dumps({"captions": texts, "classes": classes}))
    return add_task_inputs(folder, seed, level=level, n=n, frames=frames, size=size)


def add_task_inputs(
    folder: Path, seed: int, *, level: str, n: int, frames: int, size: tuple[int, int]
) -> Path:
    """Boxes, portraits and unnamed captions of a rendered shard: its scenes are drawn again, without rendering."""
    if frames == 1 or (folder / "unnamed.json").exists():
        return folder
    rng, own = np.random.default_rng(seed), np.random.default_rng((seed, 1))
    width, height = size
    boxes = np.zeros((n, frames, 4), np.float16)
    portraits = np.zeros((n, height, width, 3), np.uint8)
    texts = []
    for i in range(n):
        scene = world.sample(rng, level=level, width=width, height=height, frames=frames)
        for _ in range(CAPTIONS_PER_CLIP):
            captions.caption(scene, rng)
        boxes[i] = world.boxes(scene)[0] / (width, height, width, height)
        portraits[i] = world.portrait(scene.objects[0], width, height)
        texts.append([captions.unnamed(scene, own)])
    np.save(folder / "boxes.npy", boxes)
    np.save(folder / "portraits.npy", portraits)
    (folder / "unnamed.json").write_text(json.dumps(texts))
    return folder


def shard_sizes(n: int) -> list[int]:
    """How n clips are shared out; all shards but the last are full."""
    return [min(SHARD, n - start) for start in range(0, n, SHARD)]


def make(
    root: Path,
    *,
    level: str,
    clips: int,
    images: int,
    frames: int,
    size: tuple[int, int],
    seed: int,
    workers: int,
) -> None:
    """Fill `root/clips` and `root/images` with shards."""
    plan = [("clips", frames, i, n) for i, n in enumerate(shard_sizes(clips))]
    plan += [("images", 1, i, n) for i, n in enumerate(shard_sizes(images))]
    with ProcessPoolExecutor(workers) as pool:
        jobs = [
            pool.submit(make_shard, root / kind / f"{i:04d}", seed + i + (10**6 if kind == "images" else 0),
                        level=level, n=n, frames=length, size=size)
            for kind, length, i, n in plan
        ]  # fmt: skip
        for done, job in enumerate(jobs, 1):
            print(f"{done}/{len(jobs)} {job.result()}", flush=True)


@dataclass(frozen=True)
class Shard:
    """One shard, memory-mapped."""

    frames: NDArray[np.uint8]
    masks: NDArray[np.uint8]
    captions: list[list[str]]
    classes: NDArray[np.int64]
    boxes: NDArray[np.float16] | None = None
    portraits: NDArray[np.uint8] | None = None
    unnamed: list[list[str]] | None = None


def shards(root: Path, kind: str, *, most: int | None = None, in_memory: bool = False) -> list[Shard]:
    """The finished shards of a kind ("clips" or "images"), memory-mapped, or read into memory for random access."""
    mode = None if in_memory else "r"
    out = []
    for folder in sorted((root / kind).iterdir())[:most]:
        if (folder / "captions.json").exists():
            text = json.loads((folder / "captions.json").read_text())
            out.append(
                Shard(np.load(folder / "frames.npy", mmap_mode=mode), np.load(folder / "masks.npy"),
                      text["captions"], np.array(text["classes"]), *_task_inputs(folder))
            )  # fmt: skip
    return out


def _task_inputs(folder: Path) -> tuple:
    if not (folder / "unnamed.json").exists():
        return ()
    unnamed = json.loads((folder / "unnamed.json").read_text())
    return np.load(folder / "boxes.npy"), np.load(folder / "portraits.npy", mmap_mode="r"), unnamed


def main() -> None:
    parser = argparse.ArgumentParser(description="Render training clips.")
    parser.add_argument("root", type=Path)
    parser.add_argument("--level", default="first", choices=tuple(world.LEVELS))
    parser.add_argument("--clips", type=int, default=12 * SHARD)
    parser.add_argument("--images", type=int, default=48 * SHARD)
    parser.add_argument("--frames", type=int, default=17)
    parser.add_argument("--size", type=int, nargs=2, default=(64, 64), metavar=("WIDTH", "HEIGHT"))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--workers", type=int, default=2)
    a = parser.parse_args()
    make(
        a.root,
        level=a.level,
        clips=a.clips,
        images=a.images,
        frames=a.frames,
        size=tuple(a.size),
        seed=a.seed,
        workers=a.workers,
    )


if __name__ == "__main__":
    main()
