"""The VAE in tiles: frames larger than the working memory of a whole one.

Each tile is a clip of its own with its own stream in time; all advance together, one chunk at a time, and
their seams are blended. What tiles save is the working memory of the widest layers. What the streams remember
still covers the whole frame, so nothing has to be computed twice and frames come out in order.

Tiles differ from the whole frame near their seams: convolutions see their padding there, and the attention in
the middle of the network sees only its tile.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from mutoscope.engine.vae import SPATIAL_STRIDE, WanVAE

TILE_PX = 256
OVERLAP_PX = 64


def decode_tiled(
    vae: WanVAE, latents_BZFHW: Tensor, tile_px: int = TILE_PX, overlap_px: int = OVERLAP_PX
) -> Iterator[Tensor]:
    """What `vae.decode_stream` yields, computed in tiles of at most `tile_px` square."""
    tile, overlap = _in_latents(tile_px, overlap_px)
    ys, xs = (_spans(n, tile, overlap) for n in latents_BZFHW.shape[3:])
    streams = [vae.decode_stream(latents_BZFHW[:, :, :, y, x]) for y in ys for x in xs]
    weights = _weights(ys, SPATIAL_STRIDE, overlap_px), _weights(xs, SPATIAL_STRIDE, overlap_px)
    for pieces in zip(*streams, strict=True):
        yield _blend(pieces, ys, xs, weights, SPATIAL_STRIDE)


def encode_tiled(
    vae: WanVAE, chunks_BCFHW: Iterable[Tensor], tile_px: int = TILE_PX, overlap_px: int = OVERLAP_PX
) -> Iterator[Tensor]:
    """What `vae.encode_stream` yields, computed in tiles of at most `tile_px` square."""
    tile, overlap = _in_latents(tile_px, overlap_px)
    chunks = iter(chunks_BCFHW)
    first = next(chunks)
    ys, xs = (_spans(n // SPATIAL_STRIDE, tile, overlap) for n in first.shape[3:])
    spans = [(y, x) for y in ys for x in xs]
    copies = itertools.tee(itertools.chain([first], chunks), len(spans))

    def cut(clip: Iterator[Tensor], y: slice, x: slice) -> Iterator[Tensor]:
        return (chunk[:, :, :, _scaled(y), _scaled(x)] for chunk in clip)

    streams = [vae.encode_stream(cut(clip, y, x)) for clip, (y, x) in zip(copies, spans, strict=True)]
    weights = _weights(ys, 1, overlap), _weights(xs, 1, overlap)
    for pieces in zip(*streams, strict=True):
        yield _blend(pieces, ys, xs, weights, 1)


def _in_latents(tile_px: int, overlap_px: int) -> tuple[int, int]:
    tile, overlap = tile_px // SPATIAL_STRIDE, overlap_px // SPATIAL_STRIDE
    if not 0 < 2 * overlap <= tile:
        raise ValueError(f"overlap of {overlap_px} px, expected 8 to half a tile of {tile_px} px")
    return tile, overlap


def _spans(size: int, tile: int, overlap: int) -> list[slice]:
    """Evenly spread spans of length `tile` that cover `size` and overlap by `overlap` or more."""
    if size <= tile:
        return [slice(0, size)]
    n = -(-(size - overlap) // (tile - overlap))
    starts = (round(i * (size - tile) / (n - 1)) for i in range(n))
    return [slice(start, start + tile) for start in starts]


def _scaled(span: slice, by: int = SPATIAL_STRIDE) -> slice:
    return slice(span.start * by, span.stop * by)


def _weights(spans: Sequence[slice], scale: int, ramp: int) -> list[Tensor]:
    """The share of each span in its outputs: linear over `ramp` outputs at inner edges, 1 in sum."""
    spans = [_scaled(span, scale) for span in spans]
    total = torch.zeros(spans[-1].stop)
    raw = []
    for span in spans:
        at = torch.arange(span.start, span.stop) + 0.5
        from_start = at - span.start if span.start > 0 else torch.full_like(at, ramp)
        from_stop = span.stop - at if span.stop < len(total) else torch.full_like(at, ramp)
        raw.append(torch.minimum(from_start, from_stop).div(ramp).clamp(max=1))
        total[span] += raw[-1]
    return [weight / total[span] for weight, span in zip(raw, spans, strict=True)]


def _blend(
    pieces: Sequence[Tensor],
    ys: Sequence[slice],
    xs: Sequence[slice],
    weights: tuple[list[Tensor], list[Tensor]],
    scale: int,
) -> Tensor:
    """The weighted sum of tiles [B, C, F, h, w], row by row, as one [B, C, F, H, W]."""
    out = pieces[0].new_zeros(*pieces[0].shape[:3], ys[-1].stop * scale, xs[-1].stop * scale)
    grid = itertools.product(zip(ys, weights[0], strict=True), zip(xs, weights[1], strict=True))
    for piece, ((y, weight_y), (x, weight_x)) in zip(pieces, grid, strict=True):
        share = (weight_y[:, None] * weight_x).to(piece.device)
        out[:, :, :, _scaled(y, scale), _scaled(x, scale)] += piece * share
    return out
