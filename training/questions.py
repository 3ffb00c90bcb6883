"""What the starter is asked, and how its answers are judged: all questions, fixed by one seed, and the table's rows.

    for question in questions():
        clip = answer(engine, question)
        ...
        row.passed(question, seen)

A question is a scene that would be the right answer, its caption, and what the model is shown besides. Scenes have
combinations of attributes and captions have phrasings that training never sees. Each group of questions is one task;
a row of the table looks at one or more groups. The true clip of a question passes every row (a test holds that).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mutoscope.media.frames import psnr
from mutoscope.planning import extension_frames
from mutoscope.request import BoxTrack, Keyframe
from training import captions, world
from training.detect import Detection, detect, placed
from training.world import Scene

SEED = 20261120
KEPT_DB, OUTSIDE_DB = 26.0, 28.0
NEAR = 0.08
"""How far a followed box's centre may be from the track, root mean square, in frame fractions."""
OTHER_FORMS = (
    (112, 64, 17),
    (64, 112, 17),
    (80, 64, 17),
    (64, 80, 17),
    (96, 96, 17),
    (64, 64, 25),
    (64, 64, 33),
)
"""Width, height, frames."""


@dataclass(frozen=True)
class Question:
    """One request. `shown` are the engine's options besides prompt, seed, size and length."""

    group: str
    scene: Scene
    prompt: str
    seed: int
    shown: dict[str, Any] = field(default_factory=dict)
    box: tuple[float, float, float, float] | None = None  # repaint: what is made anew, frame fractions
    source: NDArray[np.uint8] | None = None  # repaint: the clip it is made anew in

    @cached_property
    def truth(self) -> NDArray[np.uint8]:
        """The right answer, [F, H, W, 3]; of a repaint, with the rest of the source."""
        clip = world.render(self.scene)
        if self.source is not None:
            clip = np.where(self.inside[..., None], clip, self.source)
        return clip

    @cached_property
    def inside(self) -> NDArray[np.bool_]:
        """The pixels of the box, [H, W]."""
        assert self.box is not None
        (x0, y0, x1, y1), w, h = self.box, self.scene.width, self.scene.height
        mask = np.zeros((h, w), bool)
        mask[round(y0 * h) : round(y1 * h), round(x0 * w) : round(x1 * w)] = True
        return mask


@dataclass(frozen=True)
class Seen:
    """An answer, and what the detector says about it."""

    clip: NDArray[np.uint8]
    found: Detection

    @classmethod
    def of(cls, question: Question, clip: NDArray[np.uint8]) -> Seen:
        return cls(clip, detect(clip, len(question.scene.objects)))


# ----------------------------------------------------------------------------------------------- questions


def scenes(
    rng: np.random.Generator, wanted: Callable[[Scene], bool], *, level: str = "full", **options: Any
) -> Iterator[Scene]:
    """Held-out scenes that are wanted, without end."""
    while True:
        scene = world.sample(rng, level=level, held_out=True, **options)
        if wanted(scene):
            yield scene


def one(scene: Scene) -> bool:
    """One object before a camera that stands."""
    return len(scene.objects) == 1 and scene.camera == "static"


def _moving(*motions: str) -> Callable[[Scene], bool]:
    return lambda scene: one(scene) and scene.objects[0].motion in motions


def _each_motion(rng: np.random.Generator, counts: dict[str, int], **options: Any) -> Iterator[Scene]:
    for motion, n in counts.items():
        found = scenes(rng, _moving(motion), **options)
        yield from (next(found) for _ in range(n))


def _text(rng: np.random.Generator) -> Iterator[Question]:
    """Every motion, falling the most because gravity is a row of its own."""
    counts = {**dict.fromkeys(world.DIRECTIONS, 4), **dict.fromkeys(world.MOTIONS[8:], 8), "falls": 24}
    for scene in _each_motion(rng, counts):
        yield Question("text", scene, captions.caption(scene, rng, "heldout"), 0)


def _plain(rng: np.random.Generator) -> Iterator[Question]:
    """The simple world of the first weights: one solid object, larger, on a plain or gradient background."""
    for scene in _each_motion(rng, dict.fromkeys(world.LEVELS["first"].motions, 5), level="first"):
        yield Question("plain", scene, captions.caption(scene, rng, "heldout"), 0)


def _camera(rng: np.random.Generator) -> Iterator[Question]:
    for camera in world.CAMERAS:

        def filmed(scene: Scene, camera: str = camera) -> bool:
            still = camera == "static" and one(scene) and scene.background_style == "pattern"
            return still or (scene.camera == camera != "static")

        found = scenes(rng, filmed)
        for _ in range(4):
            scene = next(found)
            prompt = captions.caption(scene, rng, "heldout")
            if camera == "static" and "camera" not in prompt:
                prompt = f"{prompt}, static camera"
            yield Question("camera", scene, prompt, 0)


def _pairs(rng: np.random.Generator) -> Iterator[Question]:
    for relation in world.RELATIONS:
        found = scenes(rng, lambda scene, relation=relation: scene.relation == relation)
        for _ in range(8):
            scene = next(found)
            yield Question("pairs", scene, captions.caption(scene, rng, "heldout"), 0)


def _forms(rng: np.random.Generator) -> Iterator[Question]:
    for width, height, frames in OTHER_FORMS:
        found = scenes(rng, one, width=width, height=height, frames=frames)
        for _ in range(3):
            scene = next(found)
            yield Question("forms", scene, captions.caption(scene, rng, "heldout"), 0)


def _first(rng: np.random.Generator) -> Iterator[Question]:
    for scene in _each_motion(rng, dict.fromkeys(world.MOTIONS, 2)):
        shown = {"keyframes": (Keyframe(image=world.render(scene)[0], index=0),)}
        yield Question("first", scene, captions.caption(scene, rng, "heldout"), 0, shown)


def _both(rng: np.random.Generator) -> Iterator[Question]:
    found = scenes(rng, one)
    for _ in range(24):
        scene = next(found)
        clip = world.render(scene)
        shown = {"keyframes": (Keyframe(image=clip[0], index=0), Keyframe(image=clip[-1], index=-1))}
        yield Question("both", scene, captions.caption(scene, rng, "heldout"), 0, shown)


def _extension(rng: np.random.Generator) -> Iterator[Question]:
    """Things that move straight on; the first half of the clip is given."""
    for scene in _each_motion(rng, dict.fromkeys(world.DIRECTIONS, 3)):
        shown = {"extend_start": world.render(scene)[: extension_frames(scene.frames)]}
        yield Question("extension", scene, captions.caption(scene, rng, "heldout"), 0, shown)


def _repaint(rng: np.random.Generator) -> Iterator[Question]:
    """A box around an object that keeps its place; another object is asked for there, on the same background."""
    found = scenes(rng, _moving("stays", "spins", "grows", "shrinks"), sizes=("medium", "large"))
    for _ in range(24):
        old, scene = next(found), next(found)
        while not (_differ(old, scene) and world.distinguishable(scene.objects[0].color, old.background)):
            scene = next(found)
        made = replace(scene.objects[0], x=0.5, y=0.5)
        scene = replace(old, objects=(made,))
        old = replace(old, objects=(replace(old.objects[0], x=0.5, y=0.5),))
        boxes = np.concatenate([world.boxes(old)[0], world.boxes(scene)[0]])
        (x0, y0), (x1, y1) = boxes[:, :2].min(0) - 4, boxes[:, 2:].max(0) + 4
        box = (max(0.0, x0 / 64), max(0.0, y0 / 64), min(1.0, x1 / 64), min(1.0, y1 / 64))
        source = world.render(old)
        yield Question(
            "repaint", scene, captions.caption(scene, rng, "heldout"), 0,
            {"video": source, "boxes": (box,)}, box, source,
        )  # fmt: skip


def _differ(a: Scene, b: Scene) -> bool:
    one_, other = a.objects[0], b.objects[0]
    return one_.color != other.color and one_.shape != other.shape and other.style != "shadow"


def _track(rng: np.random.Generator) -> Iterator[Question]:
    counts = {**dict.fromkeys(world.DIRECTIONS, 2), "falls": 3, "orbits": 3, "bounces": 2}
    for scene in _each_motion(rng, counts):
        boxes = world.boxes(scene)[0] / (scene.width, scene.height, scene.width, scene.height)
        times = np.linspace(0, 1, scene.frames)
        points = tuple((float(t), *map(float, b)) for t, b in zip(times, boxes, strict=True))
        shown = {"tracks": (BoxTrack(points=points),)}
        yield Question("track", scene, captions.caption(scene, rng, "heldout"), 0, shown)


def _reference(rng: np.random.Generator) -> Iterator[Question]:
    found = scenes(rng, lambda scene: one(scene) and scene.objects[0].style == "solid")
    for _ in range(24):
        scene = next(found)
        shown = {"references": (world.portrait(scene.objects[0], scene.width, scene.height),)}
        yield Question("reference", scene, captions.unnamed(scene, rng, "heldout"), 0, shown)


GROUPS: dict[str, Callable[[np.random.Generator], Iterator[Question]]] = {
    "text": _text, "plain": _plain, "camera": _camera, "pairs": _pairs, "forms": _forms, "first": _first,
    "both": _both, "extension": _extension, "repaint": _repaint, "track": _track, "reference": _reference,
}  # fmt: skip


@lru_cache(maxsize=len(GROUPS))
def _all(group: str) -> tuple[Question, ...]:
    place = list(GROUPS).index(group)
    asked = GROUPS[group](np.random.default_rng((SEED, place)))
    return tuple(replace(q, seed=1000 * (place + 1) + i) for i, q in enumerate(asked))


def questions(group: str, most: int | None = None) -> list[Question]:
    """The questions of a group, always the same; with `most`, that many spread evenly over them."""
    asked = list(_all(group))
    if most is None or most >= len(asked):
        return asked
    return [asked[i * len(asked) // most] for i in range(most)]


# ------------------------------------------------------------------------------------------------- judging


def _color(q: Question, s: Seen) -> bool:
    return s.found.color == q.scene.objects[0].color


def _shape(q: Question, s: Seen) -> bool:
    return s.found.shape == q.scene.objects[0].shape


def _motion(q: Question, s: Seen) -> bool:
    return s.found.motion == q.scene.objects[0].motion


def _background(q: Question, s: Seen) -> bool:
    """Its colour and its style; the direction of a gradient is never said."""
    named = s.found.detail == q.scene.detail or q.scene.background_style == "gradient"
    return (s.found.background, s.found.background_style) == (
        q.scene.background,
        q.scene.background_style,
    ) and named


def _turned(a: tuple[float, float], b: tuple[float, float]) -> float:
    """Degrees between two ways; 180 if one of them leads nowhere."""
    lengths = math.hypot(*a) * math.hypot(*b)
    if lengths < 1e-6 or not math.isfinite(lengths):
        return 180.0
    return math.degrees(math.acos(max(-1.0, min(1.0, (a[0] * b[0] + a[1] * b[1]) / lengths))))


def _direction(q: Question, s: Seen) -> bool:
    found = s.found.objects[0].direction
    return math.hypot(*found) > 0.1 and _turned(found, world.DIRECTIONS[q.scene.objects[0].motion]) <= 30


def _gravity(q: Question, s: Seen) -> bool:
    found = s.found.objects[0]
    return abs(found.gravity / world.GRAVITY - 1) <= 0.25 and found.bounces >= 1


def _camera_class(q: Question, s: Seen) -> bool:
    return s.found.camera == q.scene.camera


def _two_objects(q: Question, s: Seen) -> bool:
    """Colour and shape of both, and the relation as asked (of the object named first to the other)."""
    by_color = {o.color: o for o in s.found.objects}
    asked = q.scene.objects
    if any(o.color not in by_color or by_color[o.color].shape != o.shape for o in asked):
        return False
    in_order = replace(s.found, objects=tuple(by_color[o.color] for o in asked))
    return placed(in_order, q.scene.relation)


def _both_motions(q: Question, s: Seen) -> bool:
    by_color = {o.color: o for o in s.found.objects}
    return all(o.color in by_color and by_color[o.color].motion == o.motion for o in q.scene.objects)


def _kept(q: Question, s: Seen, *frames: int) -> bool:
    return all(psnr(s.clip[i], q.truth[i]) >= KEPT_DB for i in frames)


def _continues(q: Question, s: Seen) -> bool:
    """The way after the given frames, against the world's: direction within 30 degrees, speed within 30 %."""
    given = extension_frames(q.scene.frames)
    t = world.clip_times(q.scene.frames)[given:]
    there = np.isfinite(s.found.objects[0].centre[given:, 0])
    if there.sum() < 4:
        return False
    vx, vy = np.polyfit(t[there], s.found.objects[0].centre[given:][there], 1)[0]
    thing = q.scene.objects[0]
    asked = (thing.dx, thing.dy)
    return (
        _turned((float(vx), float(vy)), asked) <= 30
        and abs(math.hypot(vx, vy) / math.hypot(*asked) - 1) <= 0.3
    )


def _outside_kept(q: Question, s: Seen) -> bool:
    """PSNR of all that was not to be made anew; the engine does not paste the source over it."""
    assert q.source is not None
    outside = ~q.inside
    return psnr(s.clip[:, outside], q.source[:, outside]) >= OUTSIDE_DB


def _on_track(q: Question, s: Seen) -> bool:
    off = s.found.objects[0].centre - world.tracks(q.scene)[0].centre
    there = np.isfinite(off[:, 0])
    return there.mean() > 0.8 and float(np.sqrt((off[there] ** 2).sum(1).mean())) <= NEAR


Judge = Callable[[Question, Seen], bool]


@dataclass(frozen=True)
class Row:
    """One line of the table: the groups it looks at, those of their questions that count, and the judge."""

    groups: tuple[str, ...]
    judge: Judge
    bar: float | None = None  # share that is aimed at
    counts: Callable[[Question], bool] = lambda q: True


def _with(*motions: str) -> Callable[[Question], bool]:
    return lambda q: q.scene.objects[0].motion in motions


ROWS: dict[str, Row] = {
    "colour": Row(("text", "camera"), _color, 0.97),
    "background": Row(("text", "camera"), _background, 0.95),
    "shape": Row(("text", "camera"), _shape, 0.90),
    "motion class": Row(("text",), _motion, 0.85),
    "direction of moving objects, within 30 degrees": Row(("text",), _direction, 0.90, _with(*world.DIRECTIONS)),
    "gravity: acceleration within 25 %, bounces seen": Row(("text",), _gravity, 0.80, _with("falls")),
    "camera class": Row(("camera",), _camera_class, 0.80),
    "two objects: both right and related as asked": Row(("pairs",), _two_objects, 0.65),
    f"first frame kept (PSNR >= {KEPT_DB:g} dB) and motion as asked": Row(
        ("first",), lambda q, s: _kept(q, s, 0) and _motion(q, s), 0.80
    ),
    f"first and last frame kept (PSNR >= {KEPT_DB:g} dB)": Row(("both",), lambda q, s: _kept(q, s, 0, -1), 0.80),
    "extension continues the motion (direction, speed within 30 %)": Row(("extension",), _continues, 0.80),
    f"repaint: inside as asked, outside unchanged (PSNR >= {OUTSIDE_DB:g} dB)": Row(
        ("repaint",), lambda q, s: _color(q, s) and _shape(q, s) and _outside_kept(q, s), 0.75
    ),
    "box track followed (centre within 8 % of the frame)": Row(("track",), _on_track, 0.75),
    "reference object kept (colour and shape)": Row(("reference",), lambda q, s: _color(q, s) and _shape(q, s), 0.75),
    # What the rows above are made of, and the simple world.
    "background colour alone": Row(("text", "camera"), lambda q, s: s.found.background == q.scene.background),
    "two objects: both motions": Row(("pairs",), _both_motions),
    "first frame given: motion as asked": Row(("first",), _motion),
    f"first frame given: kept (PSNR >= {KEPT_DB:g} dB)": Row(("first",), lambda q, s: _kept(q, s, 0)),
    "repaint: inside as asked": Row(("repaint",), lambda q, s: _color(q, s) and _shape(q, s)),
    f"repaint: outside unchanged (PSNR >= {OUTSIDE_DB:g} dB)": Row(("repaint",), _outside_kept),
    "other sizes and lengths: colour": Row(("forms",), _color),
    "other sizes and lengths: shape": Row(("forms",), _shape),
    "other sizes and lengths: motion class": Row(("forms",), _motion),
    "simple prompts: colour": Row(("plain",), _color),
    "simple prompts: background": Row(("plain",), _background),
    "simple prompts: shape": Row(("plain",), _shape),
    "simple prompts: motion class": Row(("plain",), _motion),
    **{f"motion: {m}": Row(("text",), _motion, None, _with(m)) for m in world.MOTIONS},
}  # fmt: skip
