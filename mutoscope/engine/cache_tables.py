"""Published numbers of step caches for the released models. Measured by their authors on those models, not here.

TeaCache (arXiv 2411.19108): ali-vilab/TeaCache 7c10efc, `TeaCache4Wan2.1/teacache_generate.py`. Its signal comes from
the time embedding, which VACE models have from the text-to-video model they extend; so they share its numbers.
MagCache (arXiv 2506.09045): Zehong-Ma/MagCache df81cb1, `MagCache4Wan2.1/magcache_generate.py`, for 50 steps. Its
authors measured VACE-1.3B by itself and use the numbers of T2V-14B for VACE-14B.
"""

from __future__ import annotations

from dataclasses import dataclass

from mutoscope.errors import RequestError


@dataclass(frozen=True)
class TeaNumbers:
    """coefficients: of the polynomial, highest power first. first_steps: always computed. per_block: the signal is the
    modulation of the blocks, else the time embedding itself."""

    coefficients: tuple[float, ...]
    threshold: float
    first_steps: int
    per_block: bool


@dataclass(frozen=True)
class MagNumbers:
    """Ratios of the blocks' change from step to step, with the prompt and without; most steps left out in a row."""

    cond: tuple[float, ...]
    uncond: tuple[float, ...]
    threshold: float
    most: int


_T2V_14B_COND = (
    1.0,
    1.02504,
    1.00025,
    0.9985,
    0.99779,
    0.9966,
    0.99482,
    0.99467,
    0.99664,
    0.99434,
    0.99533,
    0.99468,
    0.99438,
    0.99516,
    0.99384,
    0.99404,
    0.99517,
    0.99409,
    0.99428,
    0.99347,
    0.99418,
    0.99271,
    0.99313,
    0.99215,
    0.99218,
    0.99216,
    0.99163,
    0.99138,
    0.98982,
    0.98996,
    0.9887,
    0.98772,
    0.98767,
    0.98573,
    0.98501,
    0.9838,
    0.98177,
    0.98037,
    0.97678,
    0.97546,
    0.97184,
    0.96711,
    0.96349,
    0.95629,
    0.94926,
    0.93964,
    0.92511,
    0.90693,
    0.8796,
    0.86111,
)
_T2V_14B_UNCOND = (
    1.0,
    1.03017,
    1.00251,
    0.99962,
    0.99771,
    0.99658,
    0.99476,
    0.99451,
    0.99656,
    0.99431,
    0.99545,
    0.99465,
    0.99434,
    0.99517,
    0.9938,
    0.99401,
    0.99516,
    0.99408,
    0.99426,
    0.99343,
    0.99416,
    0.99269,
    0.99311,
    0.99215,
    0.99215,
    0.99217,
    0.99161,
    0.99135,
    0.9898,
    0.98995,
    0.98866,
    0.9877,
    0.98765,
    0.9857,
    0.98498,
    0.98376,
    0.98173,
    0.98035,
    0.97677,
    0.97543,
    0.97183,
    0.96708,
    0.96345,
    0.95625,
    0.94929,
    0.93961,
    0.92504,
    0.90678,
    0.87945,
    0.86189,
)
_T2V_1_3B_COND = (
    1.0,
    1.0124,
    1.00166,
    0.99791,
    0.99682,
    0.99634,
    0.99567,
    0.99416,
    0.99578,
    0.9957,
    0.99511,
    0.99535,
    0.99552,
    0.99541,
    0.9954,
    0.99489,
    0.99518,
    0.99484,
    0.99481,
    0.99415,
    0.99419,
    0.99396,
    0.99388,
    0.99349,
    0.99309,
    0.9927,
    0.99228,
    0.99171,
    0.99137,
    0.99068,
    0.99005,
    0.98944,
    0.98849,
    0.98758,
    0.98644,
    0.98504,
    0.9836,
    0.98202,
    0.97977,
    0.97717,
    0.9741,
    0.97003,
    0.96538,
    0.9593,
    0.95086,
    0.94013,
    0.92402,
    0.90241,
    0.86821,
    0.81838,
)
_T2V_1_3B_UNCOND = (
    1.0,
    1.02213,
    1.0041,
    1.00061,
    0.99762,
    0.99685,
    0.99586,
    0.99422,
    0.99575,
    0.99563,
    0.99506,
    0.99531,
    0.99549,
    0.99539,
    0.99536,
    0.99485,
    0.99514,
    0.99478,
    0.99479,
    0.99413,
    0.99416,
    0.99393,
    0.99386,
    0.99349,
    0.99304,
    0.9927,
    0.99226,
    0.9917,
    0.99135,
    0.99063,
    0.99003,
    0.98942,
    0.98849,
    0.98757,
    0.98643,
    0.98503,
    0.98359,
    0.98201,
    0.97978,
    0.97718,
    0.97411,
    0.97002,
    0.96541,
    0.95933,
    0.95089,
    0.94019,
    0.92414,
    0.9026,
    0.86868,
    0.81939,
)
_VACE_1_3B_COND = (
    1.0,
    1.00129,
    1.00056,
    0.99776,
    0.99726,
    0.99725,
    0.9958,
    0.99703,
    0.99863,
    0.99735,
    0.99714,
    0.99697,
    0.9969,
    0.99695,
    0.99697,
    0.99608,
    0.99721,
    0.99649,
    0.99659,
    0.99727,
    0.99603,
    0.99652,
    0.99635,
    0.9958,
    0.99581,
    0.99573,
    0.99531,
    0.99505,
    0.99481,
    0.99426,
    0.99403,
    0.99357,
    0.99302,
    0.99243,
    0.9916,
    0.99085,
    0.98985,
    0.98857,
    0.98717,
    0.98551,
    0.98301,
    0.9805,
    0.97635,
    0.97183,
    0.96496,
    0.95526,
    0.94102,
    0.91809,
    0.87871,
    0.80141,
)
_VACE_1_3B_UNCOND = (
    1.0,
    1.0019,
    1.00053,
    0.99746,
    0.99789,
    0.99785,
    0.99625,
    0.99728,
    0.9988,
    0.99731,
    0.99707,
    0.99687,
    0.99683,
    0.99702,
    0.99701,
    0.99617,
    0.9973,
    0.99657,
    0.99667,
    0.99731,
    0.99612,
    0.99659,
    0.9964,
    0.99585,
    0.99585,
    0.99579,
    0.99534,
    0.99508,
    0.99484,
    0.99433,
    0.99406,
    0.9936,
    0.99305,
    0.99247,
    0.99164,
    0.99087,
    0.9899,
    0.98859,
    0.98721,
    0.98556,
    0.98305,
    0.98055,
    0.97641,
    0.97187,
    0.965,
    0.95533,
    0.94104,
    0.91815,
    0.87879,
    0.80164,
)

SMALL, LARGE = (1536, 30), (5120, 40)
"""Width and layers of the models called 1.3B and 14B."""

TEA: dict[tuple[int, int], TeaNumbers] = {
    SMALL: TeaNumbers(
        (2396.76752, -1311.10545, 201.331979, -8.29855975, 0.137887774), 0.05, first_steps=1, per_block=False
    ),
    LARGE: TeaNumbers(
        (-303318.725, 49053.7029, -2655.30556, 58.7365115, -0.315583525), 0.1, first_steps=5, per_block=True
    ),
}
"""Its authors advise against the second kind of signal for the small model. Thresholds are their careful ones."""

MAG: dict[tuple[int, int, bool], MagNumbers] = {
    (*SMALL, False): MagNumbers(_T2V_1_3B_COND, _T2V_1_3B_UNCOND, 0.12, 4),
    (*LARGE, False): MagNumbers(_T2V_14B_COND, _T2V_14B_UNCOND, 0.24, 6),
    (*SMALL, True): MagNumbers(_VACE_1_3B_COND, _VACE_1_3B_UNCOND, 0.02, 3),
    (*LARGE, True): MagNumbers(_T2V_14B_COND, _T2V_14B_UNCOND, 0.02, 3),
}
"""By width, layers, and whether there is a side branch."""


def published(kind: str, dim: int, n_layers: int, *, vace: bool) -> TeaNumbers | MagNumbers | None:
    """What a cache of this kind ("tea", "mag") has to know of a model of this width and depth; None: nothing.

    Raises:
        RequestError: there are no numbers for such a model.
    """
    if kind == "tea":
        name, found = "TeaCache", TEA.get((dim, n_layers))
        hint = "Use the cache easy, which needs no numbers."
    elif kind == "mag":
        name, found = "MagCache", MAG.get((dim, n_layers, vace))
        hint = "Measure them with scripts/measure_magnitudes.py, or use the cache easy."
    else:
        return None
    if found is None:
        raise RequestError(
            f"{name} needs numbers measured for a model, and there are none for one of width {dim} "
            f"with {n_layers} layers.",
            hint=hint,
        )
    return found
