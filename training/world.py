"""The toy world: short clips of flat shapes that move, with exact ground truth.

numpy only. Everything is drawn with signed-distance functions, anti-aliased over one pixel, all frames
at once.

Units
  t         time in the clip, 0 at the first frame and 1 at the last, whatever the number of frames
  x, y      fraction of the frame's width and height, y grows downwards
  radius    fraction of the frame's short side (a shape of radius r has about the area of a disk of radius r)
  angle     radians, positive turns clockwise on the screen
  velocity  frame fractions per clip; gravity is GRAVITY frame heights per clip squared for all that falls
Shapes of arrays: F frames, H height, W width, n objects.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (225, 30, 35),
    "orange": (250, 135, 15),
    "yellow": (250, 225, 30),
    "green": (60, 205, 60),
    "blue": (45, 95, 245),
    "purple": (145, 45, 215),
    "pink": (255, 130, 195),
    "white": (250, 250, 250),
    "black": (6, 6, 6),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "black": (10, 10, 10),
    "gray": (124, 124, 124),
    "navy": (22, 30, 98),
    "dark green": (15, 82, 36),
    "brown": (112, 68, 30),
    "teal": (15, 132, 138),
}
SIZES: dict[str, tuple[float, float]] = {
    "small": (0.11, 0.135),
    "medium": (0.18, 0.21),
    "large": (0.25, 0.28),
}
STYLES = ("solid", "outline", "shadow")
BACKGROUND_STYLES = ("plain", "gradient", "pattern", "horizon")
DETAILS: dict[str, tuple[str, ...]] = {
    "plain": ("",),
    "gradient": ("vertical", "horizontal", "diagonal"),
    "pattern": ("checker", "stripes"),
    "horizon": ("",),
}
DIRECTIONS: dict[str, tuple[int, int]] = {
    "left": (-1, 0),
    "right": (1, 0),
    "up": (0, -1),
    "down": (0, 1),
    "up left": (-1, -1),
    "up right": (1, -1),
    "down left": (-1, 1),
    "down right": (1, 1),
}
MOTIONS = (*DIRECTIONS, "falls", "spins", "grows", "shrinks", "stays", "orbits", "bounces")
CAMERAS = ("static", "pan left", "pan right", "tilt up", "tilt down", "zoom in", "zoom out", "roll")
RELATIONS = ("left of", "right of", "above", "below")

GRAVITY = 6.0  # frame heights per clip squared
RESTITUTION = 0.7  # speed kept by a bounce
ROUND = ("circle", "ring")  # turning these shows nothing
HALF_SIDE, TIP, INNER_TIP = (
    0.88,
    1.15,
    0.52,
)  # square; triangle and star; the star's inner corners
HOLE, ARM, ARM_HALF_WIDTH = 0.5, 1.05, 0.36  # of the ring; of the cross
# How far a shape of radius 1 and angle 0 reaches from its centre: sideways, up, down.
REACH: dict[str, tuple[float, float, float]] = {
    "circle": (1.0, 1.0, 1.0),
    "square": (HALF_SIDE, HALF_SIDE, HALF_SIDE),
    "triangle": (TIP * 0.866, TIP, TIP * 0.5),
    "star": (TIP * 0.951, TIP, TIP * 0.809),
    "ring": (1.0, 1.0, 1.0),
    "cross": (ARM, ARM, ARM),
}
GROWTH = (1.8, 2.2)  # largest radius over smallest, of what grows or shrinks
PAN, ZOOM, ROLL = 0.3, 1.5, 0.7  # what a camera does in one clip: short sides, factor, radians


@dataclass(frozen=True)
class Object:
    """One shape and how it moves. x, y, radius, angle hold at t = 0 before the camera; see `_world_track`."""

    shape: str
    color: str
    size: str
    style: str
    motion: str
    x: float
    y: float
    dx: float = 0.0  # velocity (directions, bounces)
    dy: float = 0.0
    radius: float = 0.2
    growth: float = 1.0  # radius at t = 1 over radius at t = 0
    angle: float = 0.0
    turn: float = 0.0  # radians per clip (spins: of the shape; orbits: around the orbit)
    orbit: float = 0.0  # radius of the orbit as a fraction of the short side, x and y being its centre
    phase: float = 0.0  # where on the orbit it starts, radians


@dataclass(frozen=True)
class Scene:
    """One clip: what is in it, in words, with all numbers needed to draw it at any size and length."""

    objects: tuple[Object, ...]
    background: str
    background_style: str
    detail: str = ""  # direction of the gradient, kind of pattern
    flip: bool = False  # gradient: dark end first
    camera: str = "static"
    camera_sign: int = 1  # roll: clockwise or not
    relation: str = ""  # of the first object to the second
    width: int = 64
    height: int = 64
    frames: int = 17


@dataclass(frozen=True)
class Level:
    """What `sample` draws from."""

    colors: tuple[str, ...]
    sizes: tuple[str, ...]
    styles: tuple[str, ...]
    motions: tuple[str, ...]
    background_styles: tuple[str, ...]
    camera_share: float  # share of scenes whose camera moves
    pair_share: float  # share of scenes with two objects
    tilt: float  # largest angle of an object that does not spin, radians


LEVELS: dict[str, Level] = {
    "first": Level(
        colors=tuple(c for c in COLORS if c != "black"),
        sizes=("medium", "large"),
        styles=("solid",),
        motions=("left", "right", "up", "down", "falls", "spins", "grows", "shrinks", "stays"),
        background_styles=("plain", "gradient"),
        camera_share=0.0,
        pair_share=0.0,
        tilt=0.0,
    ),
    "full": Level(
        colors=tuple(COLORS),
        sizes=tuple(SIZES),
        styles=STYLES,
        motions=MOTIONS,
        background_styles=BACKGROUND_STYLES,
        camera_share=0.25,
        pair_share=0.3,
        tilt=0.2,
    ),
}


# ------------------------------------------------------------------------------------------------ sampling


def is_held_out_combination(shape: str, color: str, motion: str) -> bool:
    """One in eight (shape, colour, motion): for each shape and motion one colour of the first eight."""
    code = SHAPES.index(shape) + 3 * list(COLORS).index(color) + 5 * MOTIONS.index(motion)
    return code % 8 == 0


def is_held_out(scene: Scene) -> bool:
    """True if an object of the scene has a combination of attributes that training never sees."""
    return any(is_held_out_combination(o.shape, o.color, o.motion) for o in scene.objects)


@lru_cache(maxsize=len(COLORS) * len(BACKGROUNDS))
def distinguishable(color: str, background: str) -> bool:
    """True if the object colour stands out from the background, darkest and lightest tone included."""
    rgb = np.array(COLORS[color], float)
    return all(np.linalg.norm(rgb - tone) >= 85.0 for tone in (*_tones(background), BACKGROUNDS[background]))


def sample(
    rng: np.random.Generator,
    *,
    level: str,
    held_out: bool | None = False,
    sizes: Sequence[str] | None = None,
    width: int = 64,
    height: int = 64,
    frames: int = 17,
) -> Scene:
    """A random scene. held_out: False for training, True for evaluation, None for either."""
    rules = LEVELS[level]
    if sizes is not None:
        rules = replace(rules, sizes=tuple(sizes))
    while True:
        draft = _draft(rng, rules)
        scene = replace(draft, width=width, height=height, frames=frames)
        if held_out is None or is_held_out(scene) == held_out:
            return scene


def _pick(rng: np.random.Generator, options: Sequence[str]) -> str:
    return options[int(rng.integers(len(options)))]


def _draft(rng: np.random.Generator, rules: Level) -> Scene:
    pair = rng.random() < rules.pair_share
    camera = "static"
    if not pair and rng.random() < rules.camera_share:
        camera = _pick(rng, CAMERAS[1:])
    style = "pattern" if camera != "static" else _pick(rng, rules.background_styles)
    background = _pick(rng, tuple(BACKGROUNDS))
    colors = [c for c in rules.colors if distinguishable(c, background)]
    relation = _pick(rng, RELATIONS) if pair else ""
    objects: list[Object] = []
    for index in range(2 if pair else 1):
        color = _pick(rng, colors)
        colors.remove(color)
        motions = [m for m in rules.motions if _allowed(m, relation, camera)]
        lane = _lane(relation, index)
        objects.append(_object(rng, rules, color, motions, lane, still=camera != "static"))
    return Scene(
        objects=tuple(objects),
        background=background,
        background_style=style,
        detail="checker" if camera.startswith("tilt") else _pick(rng, DETAILS[style]),
        flip=bool(rng.random() < 0.5),
        camera=camera,
        camera_sign=1 if rng.random() < 0.5 else -1,
        relation=relation,
    )


def _allowed(motion: str, relation: str, camera: str) -> bool:
    """A moving camera films things that keep their place; two objects keep to their own halves."""
    if camera != "static":
        return motion in ("stays", "spins")
    if relation in ("left of", "right of"):
        return motion in ("up", "down", "falls", "spins", "grows", "shrinks", "stays")
    if relation in ("above", "below"):
        return motion in ("left", "right", "spins", "grows", "shrinks", "stays")
    return True


def _lane(relation: str, index: int) -> tuple[float, float, float, float]:
    """The part of the frame that belongs to one object: x0, y0, x1, y1."""
    first = index == 0
    if relation in ("left of", "right of"):
        return (0.0, 0.0, 0.5, 1.0) if first == (relation == "left of") else (0.5, 0.0, 1.0, 1.0)
    if relation in ("above", "below"):
        return (0.0, 0.0, 1.0, 0.5) if first == (relation == "above") else (0.0, 0.5, 1.0, 1.0)
    return (0.0, 0.0, 1.0, 1.0)


def _object(
    rng: np.random.Generator,
    rules: Level,
    color: str,
    motions: Sequence[str],
    lane: tuple[float, float, float, float],
    still: bool,
) -> Object:
    """Draws one object. Shape and motion are drawn together, so that allowed pairs are equally frequent."""
    x0, y0, x1, y1 = lane
    narrow = lane != (0.0, 0.0, 1.0, 1.0)
    while True:
        shape, motion = _pick(rng, SHAPES), _pick(rng, motions)
        if motion != "spins" or shape not in ROUND:
            break
    styles = [s for s in rules.styles if not (s == "outline" and shape in ROUND)]  # a ball would be a ring
    styles = [s for s in styles if not (s == "shadow" and color == "black")]  # nor has black a visible shadow
    allowed_sizes = [s for s in rules.sizes if s != "large"] or list(rules.sizes)
    size = _pick(rng, allowed_sizes if narrow or motion in ("orbits", "bounces") else rules.sizes)
    radius = float(rng.uniform(*SIZES[size]))
    angle = float(rng.uniform(-rules.tilt, rules.tilt)) if rules.tilt else 0.0
    made = Object(shape, color, size, _pick(rng, styles), motion, 0.0, 0.0, radius=radius, angle=angle)

    biggest = radius
    if motion in ("grows", "shrinks"):
        factor = float(rng.uniform(*GROWTH))
        biggest = radius * factor**0.5
        if motion == "grows":
            made = replace(made, radius=radius / factor**0.5, growth=factor)
        else:
            made = replace(made, radius=biggest, growth=1 / factor)
    reach = REACH[shape]
    side, up, down = (biggest * r for r in reach)
    if motion == "spins":
        turn = float(rng.uniform(np.radians(130), np.radians(210))) * (1 if rng.random() < 0.5 else -1)
        made = replace(made, angle=float(rng.uniform(0, 2 * np.pi)), turn=turn)
        side = up = down = biggest * max(reach) * (2**0.5 if shape == "square" else 1.0)
    margin = 0.01
    left, right = _interval(x0 + side + margin, x1 - side - margin)
    top, bottom = _interval(y0 + up + margin, y1 - down - margin)

    if motion in DIRECTIONS:
        sx, sy = DIRECTIONS[motion]
        most_x, most_y = max(right - left, 0.35), max(bottom - top, 0.35)
        dx = sx * float(rng.uniform(0.35, min(0.55, most_x)))
        dy = sy * float(rng.uniform(0.35, min(0.55, most_y)))
        middle_x = _inside(rng, left, right, abs(dx))
        middle_y = _inside(rng, top, bottom, abs(dy))
        return replace(made, x=middle_x - dx / 2, y=middle_y - dy / 2, dx=dx, dy=dy)
    if motion == "falls":
        start = float(rng.uniform(top, top + 0.3 * (bottom - top)))
        return replace(made, x=float(rng.uniform(left, right)), y=start, angle=0.0)
    if motion == "orbits":
        orbit = float(rng.uniform(0.2, 0.25))
        turn = float(rng.uniform(1.6, 2.4) * np.pi) * (1 if rng.random() < 0.5 else -1)
        cx, cy = rng.uniform(0.47, 0.53, 2)
        phase = float(rng.uniform(0, 2 * np.pi))
        return replace(made, x=float(cx), y=float(cy), orbit=orbit, turn=turn, phase=phase)
    if motion == "bounces":
        speed = rng.uniform(1.2, 1.8, 2) * (right - left)
        heading = rng.choice([-1.0, 1.0], 2)
        start_x, start_y = float(rng.uniform(left, right)), float(rng.uniform(top, bottom))
        return replace(
            made, x=start_x, y=start_y, dx=float(speed[0] * heading[0]), dy=float(speed[1] * heading[1])
        )
    if still:
        left, right, top, bottom = 0.4, 0.6, 0.4, 0.6
    return replace(made, x=float(rng.uniform(left, right)), y=float(rng.uniform(top, bottom)))


def _interval(low: float, high: float) -> tuple[float, float]:
    """The interval, or its middle twice if it is empty."""
    return (low, high) if low <= high else ((low + high) / 2, (low + high) / 2)


def _inside(rng: np.random.Generator, low: float, high: float, travel: float) -> float:
    """Middle of a way of the given length that stays between low and high."""
    first, last = _interval(low + travel / 2, high - travel / 2)
    return float(rng.uniform(first, last))


# -------------------------------------------------------------------------------------------- ground truth


@dataclass(frozen=True)
class Track:
    """Where an object is on the screen, camera included. centre [F,2] x y, radius [F], angle [F]."""

    centre: Floats
    radius: Floats
    angle: Floats


def clip_times(frames: int) -> Floats:
    """Time of each frame, [F], 0 to 1."""
    return np.linspace(0.0, 1.0, frames, dtype=np.float32) if frames > 1 else np.zeros(1, np.float32)


def tracks(scene: Scene) -> list[Track]:
    """Ground truth of each object as seen on the screen."""
    t = clip_times(scene.frames)
    out = []
    for thing in scene.objects:
        centre, radius, angle = _world_track(thing, t, scene)
        if scene.camera != "static":
            size = _frame_size(scene)
            pan, zoom, roll = _camera(scene, t)
            from_middle = (centre - 0.5) * size - pan
            cos, sin = np.cos(roll), np.sin(roll)
            x = (from_middle[:, 0] * cos - from_middle[:, 1] * sin) * zoom
            y = (from_middle[:, 0] * sin + from_middle[:, 1] * cos) * zoom
            centre = np.stack([x, y], 1) / size + 0.5
            radius, angle = radius * zoom, angle + roll
        out.append(Track(centre.astype(np.float32), radius.astype(np.float32), angle.astype(np.float32)))
    return out


def _frame_size(scene: Scene) -> NDArray[np.float64]:
    """Width and height in short sides, [2]."""
    return np.array([scene.width, scene.height], float) / min(scene.width, scene.height)


def floor_height(thing: Object, scene: Scene) -> float:
    """y of a falling object's centre when it touches the bottom of the frame."""
    return float(1.0 - REACH[thing.shape][2] * thing.radius / _frame_size(scene)[1])


def fall(start: float, floor: float, t: NDArray[np.floating]) -> NDArray[np.float64]:
    """Height y of a thing dropped at `start` at time 0, bouncing on `floor`; [F] for times t [F]."""
    y, speed, since = np.empty(len(t)), 0.0, 0.0
    low = start  # y at `since`
    for i, now in enumerate(t.astype(float)):
        while True:  # the next time at which low + speed s + g s^2 / 2 reaches the floor
            s = (-speed + (speed**2 + 2 * GRAVITY * max(floor - low, 0.0)) ** 0.5) / GRAVITY
            if now - since < s or (s < 1e-3 and low >= floor):
                break
            speed = -RESTITUTION * (speed + GRAVITY * s)
            low, since = floor, since + s
        s = now - since
        y[i] = min(low + speed * s + GRAVITY * s * s / 2, floor)
    return y


def _triangle_wave(
    start: float, travel: NDArray[np.floating], low: float, high: float
) -> NDArray[np.floating]:
    """A way along a line between two walls."""
    span = max(high - low, 1e-6)
    at = np.mod(start - low + travel, 2 * span)
    return low + np.where(at > span, 2 * span - at, at)


def _world_track(thing: Object, t: Floats, scene: Scene) -> tuple[NDArray[np.floating], ...]:
    """Before the camera: centre [F,2], radius [F], angle [F]."""
    x, y = thing.x + thing.dx * t, thing.y + thing.dy * t
    radius = thing.radius * thing.growth**t
    angle = np.full_like(t, thing.angle)
    if thing.motion == "spins":
        angle = thing.angle + thing.turn * t
    elif thing.motion == "falls":
        y = fall(thing.y, floor_height(thing, scene), t)
    elif thing.motion == "orbits":
        width, height = _frame_size(scene)
        x = thing.x + thing.orbit / width * np.cos(thing.phase + thing.turn * t)
        y = thing.y + thing.orbit / height * np.sin(thing.phase + thing.turn * t)
    elif thing.motion == "bounces":
        width, height = _frame_size(scene)
        side, up, down = (r * thing.radius for r in REACH[thing.shape])
        x = _triangle_wave(thing.x, thing.dx * t, side / width, 1 - side / width)
        y = _triangle_wave(thing.y, thing.dy * t, up / height, 1 - down / height)
    return np.stack([x, y], 1), radius, angle


def _camera(scene: Scene, t: Floats) -> tuple[NDArray[np.floating], Floats, Floats]:
    """Of each frame: pan [F,2] in short sides, zoom [F], roll [F] of the picture in radians."""
    s = t - np.float32(0.5)
    pan, zoom, roll = np.zeros((len(t), 2)), np.ones_like(t), np.zeros_like(t)
    camera = scene.camera
    if camera in ("pan left", "pan right"):
        pan[:, 0] = PAN * s * (1 if camera == "pan right" else -1)
    elif camera in ("tilt up", "tilt down"):
        pan[:, 1] = PAN * s * (1 if camera == "tilt down" else -1)
    elif camera in ("zoom in", "zoom out"):
        zoom = np.float32(ZOOM) ** (s if camera == "zoom in" else -s)
    elif camera == "roll":
        roll = ROLL * scene.camera_sign * s
    return pan, zoom, roll


# ------------------------------------------------------------------------------------------------- drawing


def distance(shape: str, x: Floats, y: Floats) -> Floats:
    """Signed distance to the edge of a shape of radius 1 and angle 0, negative inside; any array shape."""
    if shape == "circle":
        return np.sqrt(x * x + y * y) - np.float32(1)
    if shape == "ring":
        return np.abs(np.sqrt(x * x + y * y) - np.float32((1 + HOLE) / 2)) - np.float32((1 - HOLE) / 2)
    ax, ay = np.abs(x), np.abs(y)
    if shape == "square":
        return np.maximum(ax, ay) - np.float32(HALF_SIDE)
    if shape == "cross":
        return np.minimum(
            np.maximum(ax - np.float32(ARM), ay - np.float32(ARM_HALF_WIDTH)),
            np.maximum(ax - np.float32(ARM_HALF_WIDTH), ay - np.float32(ARM)),
        )
    if shape == "triangle":
        return np.maximum(y, ax * np.float32(0.8660254) - y * np.float32(0.5)) - np.float32(TIP / 2)
    if shape == "star":  # fold the plane into one half of one tip, then the distance to one line
        for k in (0, 1):
            kx, ky = np.float32((-1) ** k * 0.80901699), np.float32(-0.58778525)  # mirrors at 36 degrees
            over = np.maximum(kx * (ax if k == 0 else x) - ky * y, np.float32(0)) * np.float32(2)
            x, y = (ax if k == 0 else x) - over * kx, y + over * ky
        x, y = np.abs(x), -y
        corner = (INNER_TIP * np.sin(np.pi / 5), INNER_TIP * np.cos(np.pi / 5))
        nx, ny = TIP - corner[1], corner[0]
        length = np.hypot(nx, ny)
        return x * np.float32(nx / length) + (y - np.float32(TIP)) * np.float32(ny / length)
    raise ValueError(f"shape {shape!r} is none of {SHAPES}")


def coverage(shape: str, style: str, track: Track, width: int, height: int, shift_px: float = 0.0) -> Floats:
    """How much of each pixel the object covers, [F,H,W] 0..1."""
    short = min(width, height)
    px = np.arange(width, dtype=np.float32) + np.float32(0.5 - shift_px)
    py = np.arange(height, dtype=np.float32) + np.float32(0.5 - shift_px)
    scale = (track.radius * np.float32(short))[:, None]  # pixels per radius
    x = ((px[None] - track.centre[:, :1] * np.float32(width)) / scale)[:, None, :]
    y = ((py[None] - track.centre[:, 1:] * np.float32(height)) / scale)[:, :, None]
    if np.any(track.angle):
        cos, sin = np.cos(track.angle)[:, None, None], np.sin(track.angle)[:, None, None]
        x, y = x * cos + y * sin, y * cos - x * sin
    d = distance(shape, x, y) * scale[:, :, None]
    if style == "outline":
        half = np.float32(max(1.25, 0.035 * short))  # half the line's width, pixels
        d = np.abs(d + half) - half
    return np.clip(np.float32(0.5) - d, np.float32(0), np.float32(1))


def _tones(background: str) -> tuple[Floats, Floats]:
    """The darker and the lighter version of a background colour, [3] each, of the same hue."""
    rgb = np.array(BACKGROUNDS[background], np.float32)
    if background == "black":
        return np.zeros(3, np.float32), np.full(3, 52, np.float32)
    return rgb * np.float32(0.6), rgb * np.float32(1.3) + np.float32(8)


def background_frames(scene: Scene) -> Floats:
    """The background, [1,H,W,3] or, with a moving camera, [F,H,W,3], 0..255."""
    rgb = np.array(BACKGROUNDS[scene.background], np.float32)
    if scene.background_style == "plain":
        return np.broadcast_to(rgb, (1, scene.height, scene.width, 3))
    t = clip_times(scene.frames) if scene.camera != "static" else np.array([0.5], np.float32)
    size = _frame_size(scene).astype(np.float32)
    short = min(scene.width, scene.height)
    x = ((np.arange(scene.width, dtype=np.float32) + 0.5) / short - size[0] / 2)[None, None, :]
    y = ((np.arange(scene.height, dtype=np.float32) + 0.5) / short - size[1] / 2)[None, :, None]
    pan, zoom, roll = _camera(scene, t)
    cos, sin = (f(roll)[:, None, None].astype(np.float32) for f in (np.cos, np.sin))
    zoomed = zoom[:, None, None].astype(np.float32)
    wx = (x * cos + y * sin) / zoomed + pan[:, 0, None, None].astype(np.float32)  # world, short sides
    wy = (y * cos - x * sin) / zoomed + pan[:, 1, None, None].astype(np.float32)
    dark, light = _tones(scene.background)
    if scene.background_style == "horizon":
        below = np.clip((wy - 0.12 * size[1]) * short + 0.5, 0, 1)
        ground = light if scene.background == "black" else rgb * np.float32(0.5)
        return rgb + below[..., None] * (ground - rgb)
    if scene.background_style == "gradient":
        u, v = wx / size[0] + 0.5, wy / size[1] + 0.5
        mix = {"vertical": v, "horizontal": u, "diagonal": (u + v) / 2}[scene.detail]
        mix = np.clip(1 - mix if scene.flip else mix, 0, 1)
    else:  # smooth-edged stripes or squares, four and a half cells on the short side
        k = np.float32(4.5 * np.pi)
        wave = np.sin(k * wx + 1.0)
        if scene.detail == "checker":
            wave = wave * np.sin(k * wy + 0.7)
        mix = np.clip(0.5 + 2.5 * wave, 0, 1)
    return dark + mix[..., None].astype(np.float32) * (light - dark)


def render(scene: Scene) -> NDArray[np.uint8]:
    """The clip, [F,H,W,3] 0..255."""
    frames = np.broadcast_to(background_frames(scene), (scene.frames, scene.height, scene.width, 3))
    for thing, track in zip(scene.objects, tracks(scene), strict=True):
        if thing.style == "shadow":
            shift_px = 0.05 * min(scene.width, scene.height)
            alpha = coverage(thing.shape, "solid", track, scene.width, scene.height, shift_px)
            frames = frames * (np.float32(1) - np.float32(0.6) * alpha)[..., None]
        alpha = coverage(thing.shape, thing.style, track, scene.width, scene.height)
        color = np.array(COLORS[thing.color], np.float32)
        frames = frames + alpha[..., None] * (color - frames)
    return (frames + np.float32(0.5)).astype(np.uint8)


def portrait(thing: Object, width: int, height: int) -> NDArray[np.uint8]:
    """The object alone, upright and large in the middle of a white picture, [H,W,3]: a reference for VACE.

    A white object stands on gray, or it could not be seen.
    """
    pose = Track(np.full((1, 2), 0.5, np.float32), np.full(1, 0.32, np.float32), np.zeros(1, np.float32))
    alpha = coverage(thing.shape, "solid" if thing.style == "shadow" else thing.style, pose, width, height)[0]
    paper = np.float32(128 if thing.color == "white" else 255)
    color = np.array(COLORS[thing.color], np.float32)
    return (paper + alpha[..., None] * (color - paper) + np.float32(0.5)).astype(np.uint8)


def object_masks(scene: Scene) -> Floats:
    """Visible part of each object, [n,F,H,W] 0..1; a later object hides an earlier one."""
    masks = [
        coverage(o.shape, o.style, track, scene.width, scene.height)
        for o, track in zip(scene.objects, tracks(scene), strict=True)
    ]
    for i in range(len(masks)):
        for later in masks[i + 1 :]:
            masks[i] = masks[i] * (1 - later)
    return np.stack(masks)


def boxes(scene: Scene) -> Floats:
    """Bounding box of the visible part of each object in pixels, [n,F,4] x0 y0 x1 y1; zeros where hidden."""
    seen = object_masks(scene) > 0.25
    out = np.zeros((*seen.shape[:2], 4), np.float32)
    for n, f in np.ndindex(*seen.shape[:2]):
        rows, columns = np.flatnonzero(seen[n, f].any(1)), np.flatnonzero(seen[n, f].any(0))
        if len(rows):
            out[n, f] = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
    return out
