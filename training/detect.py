"""Reads a clip of the toy world back: what is in it, where, and how it moves. The judge of the starter model.

    found = detect(frames)          # uint8 [F,H,W,3]
    found.objects[0].color, found.objects[0].motion, found.background, found.camera

How: the background is the closest of all backgrounds the world can draw (pixel distances saturate, so
that an object does not matter). The object colour is the one with the most pixels near it. Projecting
pixels on (object colour - background) gives the object's coverage; its centroid and area per frame give
centre and size. Sampled in polar coordinates around the centroid, coverage is correlated with templates
of each shape in all rotations, which gives shape and angle. The motion class follows from the tracks of
centre, size and angle, freed from the camera. Clips of fewer than five frames are read as pictures: no
camera, and the motion is "unknown".

Units as in `training.world`. Letters: F frames, H height, W width, R radii, A angles, K templates.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from training import world
from training.world import Floats, Scene

N_RADII, N_ANGLES, OUTERMOST = (
    20,
    120,
    1.9,
)  # of the polar samples; OUTERMOST in radii of a disk of equal area
# Degrees after which a shape looks the same; 0: always.
SYMMETRY = {
    "circle": 0.0,
    "ring": 0.0,
    "square": 90.0,
    "triangle": 120.0,
    "star": 72.0,
    "cross": 90.0,
}
SATURATION = 80.0  # colour distance from which a pixel simply does not match
TEMPLATE_RADIUS_PX = 14.0
FEWEST_FRAMES = 5  # of a clip whose motion can be told
UNKNOWN = "unknown"


@dataclass(frozen=True)
class Found:
    """One object. Tracks are on the screen; motion, velocity and gravity are freed from the camera."""

    color: str
    shape: str
    size: str
    motion: str
    direction: tuple[float, float]  # straight-line fit: frame fractions per clip, x and y
    centre: Floats  # [F,2] x y, frame fractions; nan where nothing is seen
    radius: Floats  # [F] fraction of the short side
    angle: Floats  # [F] radians, continuous over time; zeros for round shapes
    gravity: float  # frame heights per clip squared, from the frames between bounces
    bounces: int
    seen: float  # share of frames in which the object is there
    shape_scores: dict[str, float]  # mean correlation with the best template of each shape, at most 1

    @property
    def shape_margin(self) -> float:
        """How far the best shape is ahead of the second."""
        first, second = sorted(self.shape_scores.values(), reverse=True)[:2]
        return first - second


@dataclass(frozen=True)
class Detection:
    """What `detect` saw. The properties speak of the first (largest) object."""

    objects: tuple[Found, ...]
    background: str
    background_style: str
    detail: str
    camera: str
    background_error: float  # mean saturating colour distance to the background drawn, 0 to SATURATION

    @property
    def color(self) -> str:
        return self.objects[0].color

    @property
    def shape(self) -> str:
        return self.objects[0].shape

    @property
    def size(self) -> str:
        return self.objects[0].size

    @property
    def motion(self) -> str:
        return self.objects[0].motion


def detect(frames: NDArray[np.uint8], n_objects: int = 1) -> Detection:
    """What is in the clip [F,H,W,3]; objects in the order of the area of their colour."""
    if frames.ndim != 4 or frames.shape[3] != 3:
        raise ValueError(f"frames have shape {frames.shape}, expected [F,H,W,3]")
    clip = frames.astype(np.float32)
    scene, error = _find_background(clip)
    backdrop = np.broadcast_to(_backdrop(scene), clip.shape)
    difference = clip - backdrop
    quiet = np.abs(difference[::4]).max(-1) < 40
    if quiet.any():  # a decoder's slight shift of the colours
        difference = difference - np.median(difference[::4][quiet], axis=0)
    colors = _find_colors(clip, difference, scene.background, n_objects)
    covers = _coverages(difference, backdrop, colors)
    objects = tuple(_read(color, cover, scene) for color, cover in zip(colors, covers, strict=True))
    return Detection(objects, scene.background, scene.background_style, scene.detail, scene.camera, error)


def placed(found: Detection, relation: str) -> bool:
    """True if the first two objects stand in the relation on average ("left of", "above" ...)."""
    a, b = (np.nanmean(o.centre, axis=0) for o in found.objects[:2])
    axis, sign = {"left of": (0, 1), "right of": (0, -1), "above": (1, 1), "below": (1, -1)}[relation]
    return bool(sign * a[axis] < sign * b[axis])


# ---------------------------------------------------------------------------------------------- background


@lru_cache(maxsize=4)
def _candidates(width: int, height: int, frames: int) -> tuple[list[Scene], Floats]:
    """All backgrounds of the world, and each one's every fourth pixel and frame [K,P,3]."""
    scenes = []
    for name in world.BACKGROUNDS:
        for style, details in world.DETAILS.items():
            flips = (False, True) if style == "gradient" else (False,)
            for detail in details:
                still = Scene((), name, style, detail, width=width, height=height, frames=frames)
                scenes += [replace(still, flip=flip) for flip in flips]
                if style == "pattern" and frames >= FEWEST_FRAMES:
                    scenes += _filmed(still)
    step = _steps(width, height, frames)
    shape = (frames, height, width, 3)
    samples = [np.broadcast_to(world.background_frames(s), shape)[step].reshape(-1, 3) for s in scenes]
    return scenes, np.stack(samples).astype(np.float32)


def _filmed(still: Scene) -> list[Scene]:
    """The scene under every moving camera that shows on its background."""
    cameras = [c for c in world.CAMERAS[1:] if still.detail != "stripes" or not c.startswith("tilt")]
    moving = [replace(still, camera=c) for c in cameras]
    return [*moving, *(replace(s, camera_sign=-1) for s in moving if s.camera == "roll")]


def _steps(width: int, height: int, frames: int) -> tuple[slice, slice, slice]:
    """Every so manyth frame, row and column, for a quick look: about 5 x 16 x 16 samples."""
    return (
        slice(None, None, max(1, (frames - 1) // 4)),
        slice(1, None, max(1, height // 16)),
        slice(1, None, max(1, width // 16)),
    )


@lru_cache(maxsize=512)
def _backdrop(scene: Scene) -> Floats:
    return world.background_frames(scene)


def _find_background(clip: Floats) -> tuple[Scene, float]:
    """The best candidate, as an empty scene, and its error."""
    frames, height, width, _ = clip.shape
    scenes, samples = _candidates(width, height, frames)
    seen = clip[_steps(width, height, frames)].reshape(-1, 3)
    # |a - b|^2 = |a|^2 + |b|^2 - 2ab for all candidates at once
    square = (samples * samples).sum(-1) - 2 * np.einsum("kpc,pc->kp", samples, seen) + (seen * seen).sum(-1)
    errors = np.minimum(np.sqrt(np.maximum(square, 0)), SATURATION).mean(1)
    best = int(errors.argmin())
    return scenes[best], float(errors[best])


# ----------------------------------------------------------------------------------------- objects' colour


def _find_colors(clip: Floats, difference: Floats, background: str, n: int) -> list[str]:
    """The n object colours with the most evidence: soft counts of pixels near it and off the background."""
    step = (slice(None, None, 2), slice(None), slice(None))
    pixels = clip[step].reshape(-1, 3)
    off = np.abs(difference[step]).max(-1).reshape(-1) > 35
    names = [c for c in world.COLORS if world.distinguishable(c, background)]
    pixels = pixels[off]
    if len(pixels) < 8:
        return names[:n]
    rgb = np.array([world.COLORS[c] for c in names], np.float32)
    square = ((pixels[:, None] - rgb[None]) ** 2).sum(-1)
    nearest = square.argmin(1)
    near = np.exp(-square.min(1) / (2 * 40.0**2))
    votes = np.bincount(nearest, near, minlength=len(names))
    order = np.argsort(-votes)
    return [names[i] for i in order[:n]]


def _coverages(difference: Floats, backdrop: Floats, colors: list[str]) -> list[Floats]:
    """How much of each pixel each object covers, [F,H,W] 0..1 per object: least squares of its mixture."""
    ways = [np.array(world.COLORS[c], np.float32) - backdrop for c in colors]
    lengths = [(w * w).sum(-1) for w in ways]
    along = [(difference * w).sum(-1) for w in ways]
    if len(colors) == 1:
        shares = [along[0] / lengths[0]]
    else:
        cross = (ways[0] * ways[1]).sum(-1)
        determinant = lengths[0] * lengths[1] - cross**2
        opposite = determinant < 0.02 * lengths[0] * lengths[1]  # black and white on gray
        determinant = np.where(opposite, 1, determinant)
        both = (along[0] * lengths[1] - along[1] * cross, along[1] * lengths[0] - along[0] * cross)
        shares = [
            np.where(opposite, np.maximum(a / n, 0), b / determinant)
            for a, n, b in zip(along, lengths, both, strict=True)
        ]
    left = difference - sum(s[..., None] * w for s, w in zip(shares, ways, strict=True))
    trust = np.exp(-(left * left).sum(-1) / (2 * 60.0**2))  # something of another colour is not the object
    return [np.clip((s * trust - 0.15) / 0.7, 0, 1) for s in shares]


# --------------------------------------------------------------------------------------------------- shape


def _largest_piece(cover: Floats) -> Floats:
    """The coverage without what is not connected to the largest piece of each frame."""
    structure = np.zeros((3, 3, 3), int)
    structure[1] = 1  # frames are not connected
    pieces, n = ndimage.label(cover > 0.4, structure)
    if n == 0:
        return cover * 0
    areas = np.bincount(pieces.ravel(), cover.ravel(), minlength=n + 1)
    areas[0] = 0
    frame_of = np.zeros(n + 1, int)
    frame_of[pieces.ravel()] = np.repeat(np.arange(len(cover)), cover[0].size)
    keep = np.zeros(n + 1, bool)
    for f in range(len(cover)):
        own = np.flatnonzero(frame_of[1:] == f) + 1
        if len(own):
            keep[own[areas[own].argmax()]] = True
    return cover * ndimage.maximum_filter(keep[pieces], size=(1, 5, 5))


def _moments(cover: Floats) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Area [F] and centroid [F,2] x y, in pixels; the centroid is nan where there is nothing."""
    _, height, width = cover.shape
    area = cover.sum((1, 2), dtype=float)
    with np.errstate(invalid="ignore", divide="ignore"):
        x = cover.sum(1) @ (np.arange(width) + 0.5) / area
        y = cover.sum(2) @ (np.arange(height) + 0.5) / area
    return area, np.stack([x, y], 1)


def _polar(cover: Floats, centre: NDArray[np.floating], unit: NDArray[np.floating]) -> Floats:
    """Coverage around centres [F,2] at multiples of unit [F] (all pixels): [F,R,A], bilinear, 0 outside."""
    frames, height, width = cover.shape
    radii = (np.arange(N_RADII) + 0.5) * (OUTERMOST / N_RADII)
    angles = np.arange(N_ANGLES) * (2 * np.pi / N_ANGLES)
    x = centre[:, 0, None, None] + unit[:, None, None] * (radii[:, None] * np.cos(angles))[None] - 0.5 + 1
    y = centre[:, 1, None, None] + unit[:, None, None] * (radii[:, None] * np.sin(angles))[None] - 0.5 + 1
    padded = np.pad(cover, ((0, 0), (1, 1), (1, 1)))
    x, y = np.clip(x, 0, width + 0.999), np.clip(y, 0, height + 0.999)
    x0, y0 = x.astype(np.int32), y.astype(np.int32)
    fx, fy = (x - x0).astype(np.float32), (y - y0).astype(np.float32)
    f = np.arange(frames)[:, None, None]
    top = padded[f, y0, x0] * (1 - fx) + padded[f, y0, x0 + 1] * fx
    bottom = padded[f, y0 + 1, x0] * (1 - fx) + padded[f, y0 + 1, x0 + 1] * fx
    return top * (1 - fy) + bottom * fy


def _normalised(polar: Floats) -> Floats:
    """Spectrum over the angles [..., R, A//2+1] of area-weighted, zero-mean, unit-norm polar pictures."""
    weight = (np.arange(N_RADII, dtype=np.float32) + 0.5)[:, None]
    mean = (polar * weight).sum((-2, -1), keepdims=True) / (weight.sum() * N_ANGLES)
    flat = (polar - mean) * np.sqrt(weight)
    norm = np.sqrt((flat * flat).sum((-2, -1), keepdims=True))
    return np.fft.rfft(flat / np.maximum(norm, 1e-6), axis=-1)


@lru_cache(maxsize=1)
def _templates() -> tuple[list[str], NDArray[np.float64], NDArray[np.complex128]]:
    """Shape, area over radius squared, and spectrum of each template: every shape, style and sharpness."""
    names, areas, pictures = [], [], []
    side = 64
    for shape in world.SHAPES:
        looks = [("solid", TEMPLATE_RADIUS_PX, blur) for blur in (0.0, 1.0, 2.0)]
        if shape not in world.ROUND:
            looks += [("outline", r, blur) for r in (8.0, 12.0, 17.0) for blur in (0.0, 1.0)]
        for style, radius_px, blur in looks:
            track = world.Track(
                np.full((1, 2), 0.5, np.float32),
                np.full(1, radius_px / side, np.float32),
                np.zeros(1, np.float32),
            )
            cover = world.coverage(shape, style, track, side, side)
            if blur:
                cover = ndimage.gaussian_filter(cover, (0, blur, blur))
            area, centre = _moments(cover)
            pictures.append(_polar(cover, centre, np.sqrt(area / np.pi))[0])
            names.append(shape)
            areas.append(area[0] / radius_px**2)
    return names, np.array(areas), _normalised(np.stack(pictures))


def _match(polar: Floats) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Against every template: best correlation [F,K] and the rotation that gives it [F,K], radians."""
    _, _, templates = _templates()
    spectrum = np.einsum("fra,kra->fka", _normalised(polar), templates.conj())
    correlation = np.fft.irfft(spectrum, N_ANGLES, axis=-1)  # [F,K,A]
    at = correlation.argmax(-1)
    score = np.take_along_axis(correlation, at[..., None], -1)[..., 0]
    before = np.take_along_axis(correlation, (at[..., None] - 1) % N_ANGLES, -1)[..., 0]
    after = np.take_along_axis(correlation, (at[..., None] + 1) % N_ANGLES, -1)[..., 0]
    bend = 2 * score - before - after
    finer = np.where(bend > 1e-9, 0.5 * (after - before) / np.maximum(bend, 1e-9), 0)
    return score, (at + np.clip(finer, -0.5, 0.5)) * (2 * np.pi / N_ANGLES)


# ------------------------------------------------------------------------------------------------- reading


def _read(color: str, cover: Floats, scene: Scene) -> Found:
    """Everything about one object from its coverage [F,H,W]; scene is the background with its camera."""
    frames, height, width = cover.shape
    short = min(width, height)
    cover = _largest_piece(cover)
    area, centre = _moments(cover)
    there = area > 0.002 * width * height
    if there.sum() < min(3, frames):
        nothing = np.full(frames, np.nan, np.float32)
        return Found(
            color, UNKNOWN, UNKNOWN, UNKNOWN, (0.0, 0.0), np.stack([nothing] * 2, 1), nothing, nothing * 0,
            0.0, 0, float(there.mean()), dict.fromkeys(world.SHAPES, 0.0),
        )  # fmt: skip
    names, template_areas, _ = _templates()
    unit = np.sqrt(area[there] / np.pi)
    score, rotation = _match(_polar(cover[there], centre[there], unit))
    mean_score = area[there] @ score / area[there].sum()  # the larger the clearer
    by_shape = np.array(names)
    scores = {s: float(mean_score[by_shape == s].max()) for s in world.SHAPES}
    best = int(mean_score.argmax())
    shape = names[best]

    seen = np.flatnonzero(there)
    radius = np.full(frames, np.nan)
    radius[there] = np.sqrt(area[there] / template_areas[best]) / short
    angle = np.zeros(frames)
    if SYMMETRY[shape]:
        period = np.radians(SYMMETRY[shape])
        angle[there] = np.unwrap(rotation[:, best], period=period)
        angle = np.interp(np.arange(frames), seen, angle[there])
    where = np.where(there[:, None], centre / [width, height], np.nan)

    free_centre, free_radius, free_angle = _without_camera(where, radius, angle, scene)
    motion, direction, gravity, bounces = _classify(free_centre[there], free_radius[there], free_angle[there],
                                                    world.clip_times(frames)[there], shape)  # fmt: skip
    return Found(
        color=color,
        shape=shape,
        size=_size(float(np.exp(np.nanmean(np.log(free_radius))))),
        motion=motion,
        direction=direction,
        centre=where.astype(np.float32),
        radius=radius.astype(np.float32),
        angle=angle.astype(np.float32),
        gravity=gravity,
        bounces=bounces,
        seen=float(there.mean()),
        shape_scores=scores,
    )


def _size(radius: float) -> str:
    """The size class whose range is nearest."""
    return min(world.SIZES, key=lambda s: max(world.SIZES[s][0] - radius, radius - world.SIZES[s][1]))


def _without_camera(
    centre: NDArray[np.floating], radius: NDArray[np.floating], angle: NDArray[np.floating], scene: Scene
) -> tuple[NDArray[np.floating], NDArray[np.floating], NDArray[np.floating]]:
    """Tracks in the world instead of on the screen."""
    if scene.camera == "static":
        return centre, radius, angle
    size = np.array([scene.width, scene.height], float) / min(scene.width, scene.height)
    pan, zoom, roll = world._camera(scene, world.clip_times(scene.frames))
    from_middle = (centre - 0.5) * size / zoom[:, None]
    cos, sin = np.cos(roll), np.sin(roll)
    x = from_middle[:, 0] * cos + from_middle[:, 1] * sin
    y = from_middle[:, 1] * cos - from_middle[:, 0] * sin
    return (np.stack([x, y], 1) + pan) / size + 0.5, radius / zoom, angle - roll


def _classify(
    centre: NDArray[np.floating],
    radius: NDArray[np.floating],
    angle: NDArray[np.floating],
    t: Floats,
    shape: str,
) -> tuple[str, tuple[float, float], float, int]:
    """Motion class, straight-line velocity, gravity and number of bounces from the tracks at times t."""
    design = np.stack([np.ones_like(t), t], 1)
    line, *_ = np.linalg.lstsq(design, centre, rcond=None)
    velocity = line[1]
    off_line = np.sqrt(((centre - design @ line) ** 2).mean(0))  # per axis, frame fractions
    growth = float(np.linalg.lstsq(design, np.log(np.maximum(radius, 1e-3)), rcond=None)[0][1])
    turn = float(np.linalg.lstsq(design, angle, rcond=None)[0][1])
    gravity, bounces = _gravity(centre[:, 1], t)
    motion = UNKNOWN
    if len(t) < FEWEST_FRAMES:
        return motion, (0.0, 0.0), 0.0, 0
    if off_line.max() < 0.03:
        if np.hypot(*velocity) > 0.2:
            motion = min(world.DIRECTIONS, key=lambda m: -_along(velocity, world.DIRECTIONS[m]))
        elif abs(growth) > 0.3:
            motion = "grows" if growth > 0 else "shrinks"
        elif SYMMETRY[shape] and abs(turn) > 0.9:
            motion = "spins"
        elif np.hypot(*velocity) < 0.12:
            motion = "stays"
    elif off_line[0] < 0.03 and np.ptp(centre[:, 0]) < 0.15:
        dropped = centre[0, 1] <= centre[:, 1].min() + 0.04
        if dropped and gravity > 1.5:
            motion = "falls"
        elif bounces:
            motion = "bounces"
    else:
        orbit, off_circle = _circle(centre)
        round_trip = 0.12 < orbit < 0.4 and off_circle < 0.02
        motion = "orbits" if round_trip else "bounces"
    return motion, (float(velocity[0]), float(velocity[1])), gravity, bounces


def _along(velocity: NDArray[np.floating], way: tuple[int, int]) -> float:
    return float(np.dot(velocity, way) / np.hypot(*way))


def _gravity(y: NDArray[np.floating], t: Floats) -> tuple[float, int]:
    """Acceleration downwards between bounces (median second difference) and the number of bounces."""
    if len(y) < 5:
        return 0.0, 0
    dt = float(np.median(np.diff(t)))
    speed = np.diff(y) / dt
    bend = np.diff(speed) / dt
    # A bounce turns a fast fall into a rise, within one or two steps.
    rises = y[:-1] - y[1:]  # from each frame to the next
    low = [
        i
        for i in range(1, len(y) - 1)
        if rises[i - 1] <= 0 < rises[i] and max(-rises[i - 1], rises[i]) > 0.01
    ]
    near = {j for i in low for j in (i - 2, i - 1, i)}
    calm = [bend[j] for j in range(len(bend)) if j not in near]
    sharp = [i for i in low if bend[i - 1] < -1.0]
    return (float(np.median(calm)) if calm else 0.0), len(sharp)


def _circle(centre: NDArray[np.floating]) -> tuple[float, float]:
    """Least-squares circle through points [F,2]: its radius, and the rms distance from it."""
    design = np.concatenate([2 * centre, np.ones((len(centre), 1))], 1)
    solution, *_ = np.linalg.lstsq(design, (centre**2).sum(1), rcond=None)
    middle = solution[:2]
    radius = float(np.sqrt(max(solution[2] + (middle**2).sum(), 0)))
    distance = np.hypot(*(centre - middle).T)
    return radius, float(np.sqrt(((distance - radius) ** 2).mean()))
