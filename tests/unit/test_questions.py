"""The judge of the starter: true clips pass every row of its table, and wrong clips do not."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("scipy")

from training import captions, evaluate, world
from training.questions import GROUPS, ROWS, SEED, Question, Seen, questions

RARE = 5  # questions of each group that are looked at here; each detection takes about 20 ms


@pytest.fixture(scope="module")
def true_answers() -> dict[str, list[tuple[Question, Seen]]]:
    return {group: [(q, Seen.of(q, q.truth)) for q in questions(group, RARE)] for group in GROUPS}


def test_there_are_enough_questions_and_always_the_same() -> None:
    asked = {group: questions(group) for group in GROUPS}
    assert sum(len(of) for of in asked.values()) >= 256
    assert len({q.seed for of in asked.values() for q in of}) == sum(len(of) for of in asked.values())
    for name, row in ROWS.items():
        n = sum(row.counts(q) for group in row.groups for q in asked[group])
        assert n >= (20 if row.bar is not None else 4), name
    place = list(GROUPS).index("camera")
    again = list(GROUPS["camera"](np.random.default_rng((SEED, place))))
    assert [(q.scene, q.prompt) for q in again] == [(q.scene, q.prompt) for q in asked["camera"]]
    some = questions("text", 10)
    assert len(some) == 10
    assert {q.seed for q in some} <= {q.seed for q in asked["text"]}


def test_what_is_asked_was_never_trained() -> None:
    known = set(captions.vocabulary())
    for group in GROUPS:
        for q in questions(group):
            if group != "repaint":  # the object comes from one held-out scene, the background from another
                assert world.is_held_out(q.scene)
            assert set(captions.words(q.prompt)) <= known, q.prompt


def test_the_truth_passes_every_row(true_answers: dict[str, list[tuple[Question, Seen]]]) -> None:
    rows = evaluate.judged(true_answers)
    assert {name: row["share"] for name, row in rows.items() if row["share"] != 1.0} == {}
    assert {name for name, row in ROWS.items() if row.bar is not None} <= set(rows)


def test_the_answer_to_another_question_fails(true_answers: dict[str, list[tuple[Question, Seen]]]) -> None:
    """Shuffled answers: what two questions have in common by chance is all that passes."""
    shuffled = {}
    for group, answered in true_answers.items():
        seen = [s for _, s in answered]
        same_form = [(q, s) for (q, _), s in zip(answered, [*seen[1:], seen[0]], strict=True)]
        shuffled[group] = [(q, s) for q, s in same_form if q.truth.shape == s.clip.shape]
    rows = evaluate.judged(shuffled)
    for name, row in ROWS.items():
        if row.bar is not None:
            assert rows[name]["share"] <= 0.5, name


def wrong(row: str, mutant: str, clip: np.ndarray, q: Question) -> np.ndarray:
    """One thing about a true clip changed."""
    if mutant == "reversed":
        return clip[::-1].copy()
    if mutant == "mirrored":
        return clip[:, ::-1, ::-1].copy()
    if mutant == "half as fast":  # the second half never happens
        n = len(clip)
        return clip[np.arange(n) // 2]
    if mutant == "stands still":
        given = (len(clip) - 1) // 2
        return np.concatenate([clip[:given], clip[given - 1 : given].repeat(len(clip) - given, axis=0)])
    if mutant == "noisy":  # about 22 dB
        noise = np.random.default_rng(1).normal(0, 20, clip.shape)
        return np.clip(clip + noise, 0, 255).astype(np.uint8)
    if mutant == "not repainted":
        assert q.source is not None
        return q.source
    if mutant == "outside darker":
        return np.where(q.inside[..., None], clip, clip * 0.7).astype(np.uint8)
    assert mutant == "another shape and colour"
    thing = q.scene.objects[0]
    colors = [c for c in world.COLORS if c != thing.color and world.distinguishable(c, q.scene.background)]
    shape = "triangle" if thing.shape != "triangle" else "square"
    return world.render(replace(q.scene, objects=(replace(thing, shape=shape, color=colors[0]),)))


@pytest.mark.parametrize(
    ("row", "mutant"),
    [
        ("colour", "another shape and colour"),
        ("shape", "another shape and colour"),
        ("direction", "reversed"),
        ("gravity", "half as fast"),
        ("two objects", "mirrored"),
        ("first frame kept", "noisy"),
        ("first and last", "noisy"),
        ("extension", "stands still"),
        ("repaint: inside as asked, outside", "not repainted"),
        ("repaint: inside as asked, outside", "outside darker"),
        ("box track", "reversed"),
        ("reference", "another shape and colour"),
    ],
)
def test_a_wrong_clip_fails(row: str, mutant: str) -> None:
    name = next(n for n in ROWS if n.startswith(row))
    group = ROWS[name].groups[0]
    asked = [q for q in questions(group) if ROWS[name].counts(q)][:: 8 if group == "track" else 4][:3]
    passed = [ROWS[name].judge(q, Seen.of(q, wrong(row, mutant, q.truth, q))) for q in asked]
    assert not any(passed), [q.prompt for q, ok in zip(asked, passed, strict=True) if ok]


def test_a_camera_that_stands_is_not_one_that_moves() -> None:
    moving = [q for q in questions("camera") if q.scene.camera != "static"][::7]
    for q in moving:
        still = world.render(replace(q.scene, camera="static"))
        assert not ROWS["camera class"].judge(q, Seen.of(q, still)), q.prompt


def test_seeds_are_judged_to_the_byte() -> None:
    a = np.zeros((5, 16, 16, 3), np.uint8)
    b = a.copy()
    b[0, 0, 0, 0] = 1
    assert evaluate.seeds_row([a, a.copy(), b])["share"] == 1.0
    assert evaluate.seeds_row([a, b, b])["share"] == 0.0, "the same seed gave another clip"
    assert evaluate.seeds_row([a, a.copy(), a.copy()])["share"] == 0.0, "another seed gave the same clip"


# ------------------------------------------------------------------------------------------------- reports


def test_share_has_its_standard_error() -> None:
    row = evaluate.share([True] * 30 + [False] * 10)
    assert (row["share"], row["n"]) == (0.75, 40)
    assert row["standard_error"] == pytest.approx(math.sqrt(0.75 * 0.25 / 40), abs=1e-4)


def test_the_table_shows_the_weights_before(tmp_path) -> None:
    rows = {"colour": {**evaluate.share([True, False]), "bar": 0.97}, "new": evaluate.share([True])}
    assert "before" not in evaluate.table(rows)
    old = tmp_path / "old.json"
    old.write_text(json.dumps({"rows": {"colour": evaluate.share([False])}}))
    lines = evaluate.table(evaluate.with_before(rows, old)).splitlines()
    assert lines[0].count("|") == lines[1].count("|") == lines[2].count("|") == 7
    assert lines[2] == "| colour | 0.97 | 0.500 | 0.354 | 2 | 0.000 |"
    assert lines[3] == "| new |  | 1.000 | 0.000 | 1 |  |"
    page = f"a\n{evaluate.MARKS[0]}\nold\n{evaluate.MARKS[1]}\nb\n"
    once = evaluate.with_table(page, "NEW")
    assert "NEW" in once
    assert "old" not in once
    assert evaluate.with_table(once, "NEW") == once


def test_kept_clips_are_found_again(tmp_path) -> None:
    clips = [np.full((5, 16, 16, 3), i, np.uint8) for i in range(2)] + [np.zeros((9, 16, 32, 3), np.uint8)]
    np.savez_compressed(tmp_path / "forms.npz", *clips)
    found = evaluate.make(None, "forms", 3, tmp_path)  # type: ignore[arg-type]
    assert [c.shape for c in found] == [c.shape for c in clips]
    assert found[1].max() == 1
