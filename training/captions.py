"""What a scene is called: varied captions, their exact vocabulary, and class numbers for auxiliary losses.

All text comes from the tables below; `vocabulary` reads the same tables. The held-out split has its own
templates, made of words that training captions use, and always names the background.

`python -m training.captions docs/images/world.png` draws the contact sheet of the documentation.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TypeVar

import numpy as np

from training import world
from training.world import Object, Scene

T = TypeVar("T")

NOUNS: dict[str, tuple[str, ...]] = {
    "circle": ("ball", "circle"),
    "square": ("square", "box"),
    "triangle": ("triangle",),
    "star": ("star",),
    "ring": ("ring",),
    "cross": ("cross",),
}
SIZE_WORDS: dict[str, tuple[str, ...]] = {
    "small": ("small", "little"),
    "medium": ("medium",),
    "large": ("large", "big"),
}
STYLE_WORDS: dict[str, tuple[str, ...]] = {
    "solid": ("",),
    "outline": ("outlined",),
    "shadow": ("with a shadow",),
}
_GO = (("moves", "moving"), ("slides", "sliding"), ("drifts", "drifting"), ("travels", "traveling"))
_WAYS: dict[str, tuple[str, ...]] = {
    "left": ("left", "to the left", "leftwards"),
    "right": ("right", "to the right", "rightwards"),
    "up": ("up", "upwards"),
    "down": ("down", "downwards"),
    "up left": ("up and left", "diagonally up to the left"),
    "up right": ("up and right", "diagonally up to the right"),
    "down left": ("down and left", "diagonally down to the left"),
    "down right": ("down and right", "diagonally down to the right"),
}
# Each motion as (third person, participle) pairs.
VERBS: dict[str, tuple[tuple[str, str], ...]] = {
    **{m: tuple((f"{a} {w}", f"{b} {w}") for a, b in _GO for w in ways) for m, ways in _WAYS.items()},
    "falls": (
        ("falls and bounces", "falling and bouncing"),
        ("drops and bounces", "dropping and bouncing"),
        ("falls down and bounces", "falling down and bouncing"),
        ("drops and bounces under gravity", "dropping and bouncing under gravity"),
    ),
    "spins": (
        ("spins", "spinning"),
        ("rotates", "rotating"),
        ("turns", "turning"),
        ("spins around", "spinning around"),
    ),
    "grows": (("grows", "growing"), ("gets bigger", "getting bigger"), ("becomes larger", "becoming larger")),
    "shrinks": (
        ("shrinks", "shrinking"),
        ("gets smaller", "getting smaller"),
        ("becomes smaller", "becoming smaller"),
    ),
    "stays": (("stays still", "staying still"), ("does not move", "not moving"), ("rests", "resting")),
    "orbits": (("orbits", "orbiting"), ("circles around", "circling around")),
    "bounces": (
        ("bounces between the walls", "bouncing between the walls"),
        ("bounces around", "bouncing around"),
    ),
}
# Motions that can stand before the noun: "a spinning yellow cross".
ADJECTIVES: dict[str, tuple[str, ...]] = {
    "spins": ("spinning", "rotating", "turning"),
    "grows": ("growing",),
    "shrinks": ("shrinking",),
    "stays": ("still", "resting"),
}
DETAIL_WORDS: dict[str, str] = {"checker": "checkered", "stripes": "striped"}
CAMERA_PHRASES: dict[str, tuple[str, ...]] = {
    "static": ("static camera", "the camera does not move"),
    "pan left": ("the camera pans left", "camera panning left"),
    "pan right": ("the camera pans right", "camera panning right"),
    "tilt up": ("the camera tilts up", "camera tilting up"),
    "tilt down": ("the camera tilts down", "camera tilting down"),
    "zoom in": ("the camera zooms in", "camera zooming in"),
    "zoom out": ("the camera zooms out", "camera zooming out"),
    "roll": ("the camera rolls", "camera rolling"),
}
RELATION_WORDS: dict[str, tuple[str, ...]] = {
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "above": ("above",),
    "below": ("below",),
}

# {it}: "a red ball". {does}: "falls and bounces". {doing}: "falling and bouncing". {on}: "a gray background".
# {bg}: "gray background". {quick}: "a spinning red cross", where the motion has an adjective.
TRAIN_TEMPLATES = (
    "{it} {does} on {on}",
    "{it} {doing} on {on}",
    "on {on}, {it} {does}",
    "{it} {does}, {bg}",
    "{it} {doing}, {bg}",
    "there is {it} {doing} on {on}",
    "{it} on {on}, it {does}",
    "{bg}, {it} {does}",
)
TRAIN_QUICK_TEMPLATES = ("{quick}, {bg}", "{quick} on {on}")
BARE_TEMPLATES = ("{it} {does}", "{it} {doing}")  # the few training captions without a background
BARE_SHARE = 0.04
HELD_OUT_TEMPLATES = (
    "on {on} there is {it}, it {does}",
    "{bg}, {it} {doing}",
    "on {on}, {doing}, {it}",
    "there is {it}, it {does}, on {on}",
)
PAIR_TEMPLATES = (
    "{one} {relation} {two} on {on}, the {first} {does} and the {second} {does_too}",
    "on {on}, {one} {relation} {two}, the {first} {doing} and the {second} {doing_too}",
    "{bg}, {one} {doing} {relation} {two} {doing_too}",
)
HELD_OUT_PAIR_TEMPLATES = (
    "{one} {relation} {two}, {bg}, the {first} {does} and the {second} {does_too}",
    "there is {one} {doing} {relation} {two} {doing_too} on {on}",
)

_COLUMNS: dict[str, tuple[str, ...]] = {
    "shape": world.SHAPES,
    "color": tuple(world.COLORS),
    "size": tuple(world.SIZES),
    "motion": world.MOTIONS,
    "background": tuple(world.BACKGROUNDS),
    "background_style": world.BACKGROUND_STYLES,
    "camera": world.CAMERAS,
    "style": world.STYLES,
    "relation": world.RELATIONS,
    **{
        f"{place} {name}": values
        for place in ("near", "far")
        for name, values in (
            ("shape", world.SHAPES),
            ("color", tuple(world.COLORS)),
            ("motion", world.MOTIONS),
        )
    },
}
ATTRIBUTE_SIZES: dict[str, int] = {name: len(values) for name, values in _COLUMNS.items()}
NO_CLASS = -100  # of an attribute that a scene does not have; what cross entropy ignores


def column(name: str) -> int:
    """Where an attribute stands in a row of classes."""
    return list(ATTRIBUTE_SIZES).index(name)


def class_of(name: str, value: str) -> int:
    """The class number of one value of an attribute."""
    return _COLUMNS[name].index(value)


def shares(classes: np.ndarray, oftener: dict[str, dict[str, float]]) -> np.ndarray:
    """How often rows of classes [N, attributes] are drawn, [N], in sum 1: factors by attribute and value multiply."""
    share = np.ones(len(classes))
    for name, factors in oftener.items():
        for value, factor in factors.items():
            share[classes[:, column(name)] == class_of(name, value)] *= factor
    return share / share.sum()


def attributes(scene: Scene) -> dict[str, int]:
    """Class number of each attribute, below `ATTRIBUTE_SIZES`, of the first object.

    "near" is the left or upper one of two objects, "far" the other: to name them takes the relation and the order of
    the words together. NO_CLASS where there is one object only.
    """
    seen = {**vars(scene), **vars(scene.objects[0])}
    if scene.relation:
        ordered = scene.objects if scene.relation in ("left of", "above") else scene.objects[::-1]
        for place, thing in zip(("near", "far"), ordered, strict=True):
            seen |= {f"{place} {name}": value for name, value in vars(thing).items()}
    return {
        name: values.index(seen[name]) if seen.get(name) else NO_CLASS for name, values in _COLUMNS.items()
    }


def caption(scene: Scene, rng: np.random.Generator, split: str = "train") -> str:
    """One description of the scene, lower case. split: "train", or "heldout" for phrasings never trained."""
    if split not in ("train", "heldout"):
        raise ValueError(f"split {split!r} is neither 'train' nor 'heldout'")
    heldout = split == "heldout"
    background = _background(scene, rng)
    fields = {"bg": background, "on": f"a {background}"}
    first = scene.objects[0]
    fields["it"] = _phrase(first, rng)
    fields["does"], fields["doing"] = _pick(rng, VERBS[first.motion])
    if len(scene.objects) == 2:
        second = scene.objects[1]
        fields["one"], fields["two"] = fields["it"], _phrase(second, rng)
        fields["does_too"], fields["doing_too"] = _pick(rng, VERBS[second.motion])
        fields["relation"] = _pick(rng, RELATION_WORDS[scene.relation])
        fields["first"], fields["second"] = (f"{o.color} {_pick(rng, NOUNS[o.shape])}" for o in scene.objects)
        template = _pick(rng, HELD_OUT_PAIR_TEMPLATES if heldout else PAIR_TEMPLATES)
    elif heldout:
        template = _pick(rng, HELD_OUT_TEMPLATES)
    elif rng.random() < BARE_SHARE:
        template = _pick(rng, BARE_TEMPLATES)
    elif first.motion in ADJECTIVES and rng.random() < 0.25:
        fields["quick"] = _phrase(first, rng, _pick(rng, ADJECTIVES[first.motion]))
        template = _pick(rng, TRAIN_QUICK_TEMPLATES)
    else:
        template = _pick(rng, TRAIN_TEMPLATES)
    text = template.format(**fields)
    if scene.camera != "static" or (scene.background_style == "pattern" and rng.random() < 0.3):
        text = f"{text}, {_pick(rng, CAMERA_PHRASES[scene.camera])}"
    return text


UNNAMED_TEMPLATES = ("it {does} on {on}", "on {on}, it {does}", "{bg}, it {does}")
HELD_OUT_UNNAMED_TEMPLATES = ("it {does}, {bg}",)


def unnamed(scene: Scene, rng: np.random.Generator, split: str = "train") -> str:
    """A caption that says what happens and where, but not what the (first) object is: a reference shows that."""
    background = _background(scene, rng)
    does, _ = _pick(rng, VERBS[scene.objects[0].motion])
    templates = HELD_OUT_UNNAMED_TEMPLATES if split == "heldout" else UNNAMED_TEMPLATES
    text = _pick(rng, templates).format(does=does, bg=background, on=f"a {background}")
    return text if scene.camera == "static" else f"{text}, {_pick(rng, CAMERA_PHRASES[scene.camera])}"


def _pick(rng: np.random.Generator, options: tuple[T, ...]) -> T:
    return options[int(rng.integers(len(options)))]


def _phrase(thing: Object, rng: np.random.Generator, adjective: str = "") -> str:
    """ "a large red ball" ; the size is named about half the time, and never of what grows or shrinks."""
    words = [adjective]
    if thing.motion not in ("grows", "shrinks") and rng.random() < 0.5:
        words.append(_pick(rng, SIZE_WORDS[thing.size]))
    style = _pick(rng, STYLE_WORDS[thing.style])
    words += ["" if thing.style == "shadow" else style, thing.color, _pick(rng, NOUNS[thing.shape])]
    words.append(style if thing.style == "shadow" else "")
    text = " ".join(w for w in words if w)
    return f"{'an' if text[0] in 'aeiou' else 'a'} {text}"


def _background(scene: Scene, rng: np.random.Generator) -> str:
    """ "gray gradient background", "plain gray background"."""
    color, style = scene.background, scene.background_style
    if style == "gradient":
        return f"{color} gradient background" if rng.random() < 0.7 else f"{color} background with a gradient"
    if style == "pattern":
        return f"{DETAIL_WORDS[scene.detail]} {color} background"
    if style == "horizon":
        return f"{color} background with a horizon"
    return f"plain {color} background" if rng.random() < 0.3 else f"{color} background"


def words(text: str) -> list[str]:
    """The words of a caption, without punctuation."""
    return re.findall(r"[a-z]+", text.lower())


def _tables() -> Iterator[str]:
    yield "a an plain background gradient with horizon"
    for table in (NOUNS, SIZE_WORDS, STYLE_WORDS, ADJECTIVES, CAMERA_PHRASES, RELATION_WORDS):
        for entries in table.values():
            yield from entries
    for pairs in VERBS.values():
        for pair in pairs:
            yield from pair
    yield from (*DETAIL_WORDS.values(), *world.COLORS, *world.BACKGROUNDS)
    for templates in (TRAIN_TEMPLATES, TRAIN_QUICK_TEMPLATES, BARE_TEMPLATES, HELD_OUT_TEMPLATES):
        yield from templates
    yield from (*PAIR_TEMPLATES, *HELD_OUT_PAIR_TEMPLATES)


def vocabulary() -> list[str]:
    """Every word that a caption of any level and split can contain, sorted."""
    return sorted({word for text in _tables() for word in words(re.sub(r"\{\w+\}", " ", text))})


def draw_sheet(path: str, seed: int = 1) -> None:
    """A picture of captioned clips, every fourth frame: ten of level "first", ten of level "full"."""
    from PIL import Image, ImageDraw

    rng = np.random.default_rng(seed)
    rows = []
    for level in ("first", "full"):
        for index in range(10):
            scene = world.sample(rng, level=level)
            motion = world.LEVELS[level].motions[index % 9]
            while level == "first" and scene.objects[0].motion != motion:
                scene = world.sample(rng, level=level)
            rows.append((scene, f"{level}: {caption(scene, rng)}"))
    size, line = 64, 14
    sheet = Image.new("RGB", (2 * (5 * (size + 2) + 120), 10 * (size + line + 4)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (scene, text) in enumerate(rows):
        x, y = (i // 10) * (sheet.width // 2), (i % 10) * (size + line + 4)
        for k, frame in enumerate(world.render(scene)[::4]):
            sheet.paste(Image.fromarray(frame), (x + k * (size + 2), y))
        cut = text if len(text) < 76 else text[:76].rsplit(" ", 1)[0] + " ..."
        draw.text((x, y + size + 1), cut, fill="black")
    sheet.save(path, optimize=True)


if __name__ == "__main__":
    import sys

    draw_sheet(sys.argv[1])
