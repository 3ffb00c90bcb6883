"""How often the starter does what it is asked, measured with the analytic detectors of `detect.py`.

    python -m training.evaluate --json docs/starter-evaluation.json --write README.md docs/starter.md
    python -m training.evaluate --rows camera pairs --most 8          a part of it, quickly

`questions.py` says what is asked and how answers are judged. Clips are made by the engine's own pipeline, from the
shipped files or those of `--model`. With `--clips FOLDER` they are kept, group by group: an evaluation that was stopped
goes on from there (use another folder for other weights).
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from mutoscope import Engine
from mutoscope.engine.conditioning import prepare
from mutoscope.media.frames import contact_sheet
from mutoscope.media.write import write_image
from mutoscope.request import Conditioning
from training.questions import GROUPS, ROWS, SEED, Question, Seen, questions

MARKS = ("<!-- evaluation: written by training/evaluate.py -->", "<!-- end of evaluation -->")
SEEDS = "seeds"
SEEDS_ROW = "two seeds give different clips, the same seed the same bytes"
N_SEEDS = 20
TASKS = ("first", "both", "extension", "repaint", "track", "reference")

Clip = NDArray[np.uint8]
Row = dict[str, Any]


def answer(engine: Engine, question: Question, *, seed: int | None = None) -> Clip:
    """The engine's clip, uint8 [F, H, W, 3]. seed: another than the question's."""
    scene = question.scene
    return engine.generate(
        question.prompt, seed=question.seed if seed is None else seed, width=scene.width, height=scene.height,
        frames=scene.frames, **question.shown,
    ).frames  # fmt: skip


def make(engine: Engine, group: str, most: int | None, kept: Path | None) -> list[Clip]:
    """The answers to a group; of "seeds" three clips per prompt, made with its seed, the same, and another."""
    path = None if kept is None else kept / f"{group}.npz"
    if path is not None and path.exists():
        with np.load(path) as file:
            return [file[f"arr_{i}"] for i in range(len(file.files))]
    if group == SEEDS:
        asked = questions("text", min(N_SEEDS, most or N_SEEDS))
        clips = [answer(engine, q, seed=seed) for q in asked for seed in (q.seed, q.seed, q.seed + 500)]
    else:
        clips = [answer(engine, q) for q in questions(group, most)]
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(path, *clips)
    return clips


def share(hits: Iterable[bool]) -> Row:
    """Share of hits with its standard error."""
    values = np.array(list(hits), float)
    p = float(values.mean()) if len(values) else float("nan")
    return {
        "share": round(p, 4),
        "standard_error": round(math.sqrt(max(p * (1 - p), 0) / max(len(values), 1)), 4),
        "n": len(values),
    }


def judged(answers: Mapping[str, list[tuple[Question, Seen]]]) -> dict[str, Row]:
    """The rows whose groups were all answered, in the order of the table."""
    rows = {}
    for name, row in ROWS.items():
        if all(group in answers for group in row.groups):
            of = [(q, s) for group in row.groups for q, s in answers[group] if row.counts(q)]
            if not of:
                continue
            rows[name] = share(row.judge(q, s) for q, s in of)
            if row.bar is not None:
                rows[name]["bar"] = row.bar
    return rows


def seeds_row(clips: list[Clip]) -> Row:
    """Of three clips per prompt: the first two are equal to the byte, the third differs."""
    triples = [clips[i : i + 3] for i in range(0, len(clips), 3)]
    hits = [np.array_equal(a, b) and not np.array_equal(a, c) for a, b, c in triples]
    return {**share(hits), "bar": 1.0}


def evaluate(
    engine: Engine,
    groups: Iterable[str] = (*GROUPS, SEEDS),
    *,
    most: int | None = None,
    kept: Path | None = None,
) -> tuple[dict[str, Row], dict[str, list[tuple[Question, Seen]]]]:
    """Rows of the table, and the answers to each group."""
    answers: dict[str, list[tuple[Question, Seen]]] = {}
    seeds: dict[str, Row] = {}
    for group in groups:
        start = time.time()
        clips = make(engine, group, most, kept)
        if group == SEEDS:
            seeds = {SEEDS_ROW: seeds_row(clips)}
        else:
            answers[group] = [(q, Seen.of(q, c)) for q, c in zip(questions(group, most), clips, strict=True)]
        print(f"{group}: {len(clips)} clips, {time.time() - start:.0f} s", flush=True)
    rows = judged(answers)
    barred = {name: row for name, row in rows.items() if "bar" in row}
    return barred | seeds | rows, answers


# ------------------------------------------------------------------------------------------------- reports


def table(rows: Mapping[str, Row]) -> str:
    """The rows as Markdown. "before" is the same question put to the weights that these replace."""
    before = any("before" in row for row in rows.values())
    lines = [
        f"| what is asked | aim | seen | standard error | prompts |{' weights before |' if before else ''}"
    ]
    lines.append("|---|---|---|---|---|" + ("---|" if before else ""))
    for name, row in rows.items():
        aim = f"{row['bar']:.2f}" if "bar" in row else ""
        cells = [name, aim, f"{row['share']:.3f}", f"{row['standard_error']:.3f}", str(row["n"])]
        if before:
            cells.append(f"{row['before']:.3f}" if "before" in row else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def with_table(page: str, rows: str) -> str:
    """The page with its evaluation table replaced, which stands between two marks."""
    before, rest = page.split(MARKS[0])
    return f"{before}{MARKS[0]}\n\n{rows}\n\n{MARKS[1]}{rest.split(MARKS[1])[1]}"


def _strip(clip: NDArray[np.uint8], width: int = 64, height: int = 64) -> Clip:
    """Five frames of a clip side by side, cut to the size of the sheet."""
    last = len(clip) - 1
    return np.concatenate([clip[i * last // 4, :height, :width] for i in range(5)], axis=1)


def text_sheet(answers: list[tuple[Question, Seen]], n: int = 24) -> Clip:
    """Five frames of every so manyth answer, in three columns."""
    chosen = [answers[i * len(answers) // n][1].clip for i in range(n)]
    return contact_sheet(np.stack([_strip(clip) for clip in chosen]), 3)


def task_sheet(answers: Mapping[str, list[tuple[Question, Seen]]], n: int = 3) -> Clip:
    """For each task, n questions side by side: what the model is shown, and below what it made of it."""
    strips = []
    for group in TASKS:
        chosen = [answers[group][i * len(answers[group]) // n] for i in range(n)]
        for question, _ in chosen:
            scene = question.scene
            shown = prepare(Conditioning(**question.shown), scene.width, scene.height, scene.frames)
            frames = np.rint(shown.frames).astype(np.uint8)
            if shown.references:
                frames = np.concatenate([np.stack(shown.references), frames[1:]])
            strips.append(_strip(frames))
        strips += [_strip(seen.clip) for _, seen in chosen]
    return contact_sheet(np.stack(strips), n)


def with_before(rows: dict[str, Row], before: Path) -> dict[str, Row]:
    """The rows with the shares of another evaluation beside them."""
    old = json.loads(before.read_text())["rows"]
    return {n: {**row, "before": old[n]["share"]} if n in old else row for n, row in rows.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = (*GROUPS, SEEDS)
    parser.add_argument("--model", default="pocket", help='"pocket" or a folder with a model.toml')
    parser.add_argument(
        "--rows", nargs="*", choices=names, default=names, help="groups of questions (default: all)"
    )
    parser.add_argument("--most", type=int, help="so many questions of each group, for a quick look")
    parser.add_argument("--clips", type=Path, help="folder where the clips are kept, and found again")
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--before", type=Path, help="JSON of the weights that these replace, for a column of its own"
    )
    parser.add_argument("--sheets", type=Path, help="folder for pictures of the answers")
    parser.add_argument("--write", type=Path, nargs="*", default=[], help="pages whose table is replaced")
    parser.add_argument("--precision", default="auto", help="as of mutoscope generate: exact to compare with")
    parser.add_argument("--threads", type=int)
    a = parser.parse_args()
    if a.threads:
        torch.set_num_threads(a.threads)
    start = time.time()
    rows, answers = evaluate(Engine(a.model, precision=a.precision), a.rows, most=a.most, kept=a.clips)
    if a.before:
        rows = with_before(rows, a.before)
    if a.json:
        asked = sum(len(answered) for answered in answers.values())
        a.json.write_text(json.dumps({"seed": SEED, "prompts": asked, "rows": rows}, indent=1) + "\n")
    if a.sheets:
        a.sheets.mkdir(parents=True, exist_ok=True)
        if "text" in answers:
            write_image(a.sheets / "starter.png", text_sheet(answers["text"]))
        if all(group in answers for group in TASKS):
            write_image(a.sheets / "starter-tasks.png", task_sheet(answers))
    for page in a.write:
        page.write_text(with_table(page.read_text(), table(rows)))
    print(table(rows))
    print(f"{time.time() - start:.0f} s")


if __name__ == "__main__":
    main()
