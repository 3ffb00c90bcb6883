"""From standard to high dynamic range: inverse tone mapping, and the curves of PQ and HLG. Pure functions on arrays.

Sources: Rec. ITU-R BT.2446-1 Method A (the expansion from 100 to 1000 cd/m2), BT.2087 (BT.709 to BT.2020 primaries),
BT.2100 (PQ and HLG), BT.1886 (the display that SDR is made for: a power of 2.4), SMPTE ST 2084 (PQ).

It expands brightness; it does not bring back what was clipped when the picture was made.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from mutoscope.media.frames import check_frames
from mutoscope.request import FramesHWC

Array = npt.NDArray[np.float32]
PEAK_NITS = 1000.0
"""Luminance of the brightest white, cd/m2: what Method A was designed for."""
REFERENCE_WHITE_NITS = 203.0
"""HDR reference white, BT.2408."""
SDR_GAMMA = 2.4

BT709_TO_BT2020 = np.array(
    [[0.6274, 0.3293, 0.0433], [0.0691, 0.9195, 0.0114], [0.0164, 0.0880, 0.8956]], np.float32
)
"""BT.2087 table; for linear light, rows give R, G and B of BT.2020."""
LUMA_2020 = np.array([0.2627, 0.6780, 0.0593], np.float32)
_CB, _CR = 1.8814, 1.4746  # BT.2020: B'-Y' and R'-Y' in units of C'b and C'r

_M1, _M2 = 2610 / 16384, 2523 / 4096 * 128
_C1, _C2, _C3 = 3424 / 4096, 2413 / 4096 * 32, 2392 / 4096 * 32


def pq_encode(nits: npt.ArrayLike) -> Array:
    """Luminance in cd/m2 (0..10000) to a PQ signal 0..1 (ST 2084, the inverse EOTF)."""
    y = np.clip(np.asarray(nits, np.float32) / 10000, 0, 1) ** _M1
    return np.asarray(((_C1 + _C2 * y) / (1 + _C3 * y)) ** _M2, np.float32)


def pq_decode(signal: npt.ArrayLike) -> Array:
    """A PQ signal 0..1 to luminance in cd/m2 (ST 2084, the EOTF)."""
    e = np.clip(np.asarray(signal, np.float64), 0, 1) ** (1 / _M2)
    return np.asarray(10000 * (np.maximum(e - _C1, 0) / (_C2 - _C3 * e)) ** (1 / _M1), np.float32)


_A, _B, _C = 0.17883277, 0.28466892, 0.55991073


def hlg_encode(scene: npt.ArrayLike) -> Array:
    """Scene light 0..1 to an HLG signal 0..1 (BT.2100, the OETF)."""
    e = np.clip(np.asarray(scene, np.float32), 0, 1)
    with np.errstate(invalid="ignore", divide="ignore"):
        bright = _A * np.log(12 * e - _B) + _C
    return np.asarray(np.where(e <= 1 / 12, np.sqrt(3 * e), bright), np.float32)


def hlg_from_display(nits_rgb: Array) -> Array:
    """Light of a 1000 cd/m2 display, linear BT.2020 [..., 3], to HLG signals: without the display's gamma of 1.2."""
    light = np.clip(nits_rgb / PEAK_NITS, 0, 1)
    luminance = np.maximum(light @ LUMA_2020, 1e-6)[..., None]
    return hlg_encode(light * luminance ** (1 / 1.2 - 1))


def expand_luma(luma: npt.ArrayLike) -> Array:
    """BT.2446-1 Method A, SDR to HDR: gamma-coded luma 0..1 of a 100 cd/m2 picture to that of a 1000 cd/m2 one."""
    y = np.clip(np.asarray(luma, np.float32), 0, 1) * 255
    low = (1.8712e-5 * y - 2.7334e-3) * y + 1.3141
    high = (2.8305e-6 * y - 7.4622e-4) * y + 1.2528
    exponent = np.where(y <= 70, low, high)
    return np.asarray(np.clip(y**exponent / 1000, 0, 1), np.float32)


def to_hdr(frame: FramesHWC) -> Array:
    """A BT.709 picture, uint8 [H, W, 3], as linear BT.2020 light in cd/m2, 0..1000 (float32 [H, W, 3])."""
    check_frames(frame, ndim=(3,), what="picture")
    wide = (_LINEAR[frame] @ BT709_TO_BT2020.T).clip(0, 1) ** (1 / SDR_GAMMA)
    luma = wide @ LUMA_2020
    expanded = expand_luma(luma)
    gain = np.where(luma > 0, 1.075 * expanded / np.maximum(luma, 1e-6), 1.0)
    cb = (wide[..., 2] - luma) / _CB * gain
    cr = (wide[..., 0] - luma) / _CR * gain
    red, blue = expanded + _CR * cr, expanded + _CB * cb
    green = (expanded - LUMA_2020[0] * red - LUMA_2020[2] * blue) / LUMA_2020[1]
    coded = np.stack([red, green, blue], axis=-1).clip(0, 1)
    return np.asarray(coded**SDR_GAMMA * PEAK_NITS, np.float32)


_LINEAR = (np.arange(256, dtype=np.float32) / 255) ** SDR_GAMMA
