"""The VAE in tiles: frames larger than the memory for a whole one.

Tiles are worked off one after the other, each a clip of its own, streamed in time and blended into its place.
So memory is that of one tile, working memory and what its layers remember, and of the clip at two bytes a
value. Side by side in time they would need no clip, but they overlap and so remember more than the whole
frame does. Measured for a frame of 256 px: whole 10.5 kB per pixel, in tiles of 128 px side by side 12.3, one
after the other 2.6.

Tiles differ from the whole frame near their seams: convolutions see their padding there, and the attention in
the middle of the network sees only its tile.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise, product

import torch
from torch import Tensor

from mutoscope.engine.vae import SPATIAL_STRIDE, TEMPORAL_STRIDE, WanVAE

TILE_PX = 256
OVERLAP_PX = 64


def decode_tiled(
    vae: WanVAE, latents_BZFHW: Tensor, tile_px: int = TILE_PX, overlap_px: int = OVERLAP_PX
) -> Iterator[Tensor]:
    """What `vae.decode_stream` yields, computed in tiles of at most `tile_px` square.

    With more than one tile the frames come from host memory, and only after the last tile.
    """
    tile, overlap = _in_latents(tile_px, overlap_px)
    b, _, n_latent_frames, height, width = latents_BZFHW.shape
    ys, xs = _spans(height, tile, overlap), _spans(width, tile, overlap)
    if len(ys) == len(xs) == 1:
        yield from vae.decode_stream(latents_BZFHW)
        return
    n_frames = 1 + (n_latent_frames - 1) * TEMPORAL_STRIDE
    size = (height * SPATIAL_STRIDE, width * SPATIAL_STRIDE)
    clip = torch.zeros(b, 3, n_frames, *size, dtype=torch.float16)  # 16 times finer than 8-bit pixels
    for (y, x), share in _shares(ys, xs, SPATIAL_STRIDE, overlap_px):
        start = 0
        for frames in vae.decode_stream(latents_BZFHW[:, :, :, y, x]):
            stop = start + frames.shape[2]
            clip[:, :, start:stop, _scaled(y), _scaled(x)] += frames.cpu() * share
            start = stop
    for start, stop in pairwise([0, *range(1, n_frames, TEMPORAL_STRIDE), n_frames]):
        yield clip[:, :, start:stop].float()


def encode_tiled(
    vae: WanVAE, chunks_BCFHW: Iterable[Tensor], tile_px: int = TILE_PX, overlap_px: int = OVERLAP_PX
) -> Iterator[Tensor]:
    """What `vae.encode_stream` yields, computed in tiles of at most `tile_px` square."""
    tile, overlap = _in_latents(tile_px, overlap_px)
    chunks = [chunk.to(vae.dtype) for chunk in chunks_BCFHW]  # as the encoder will see them
    ys, xs = (_spans(n // SPATIAL_STRIDE, tile, overlap) for n in chunks[0].shape[3:])
    latents: list[Tensor] = []
    for (y, x), share in _shares(ys, xs, 1, overlap):
        cut = (chunk[:, :, :, _scaled(y), _scaled(x)] for chunk in chunks)
        for i, piece in enumerate(vae.encode_stream(cut)):
            if i == len(latents):
                latents.append(piece.new_zeros(*piece.shape[:3], ys[-1].stop, xs[-1].stop))
            latents[i][:, :, :, y, x] += piece * share.to(piece.device)
    yield from latents


def _in_latents(tile_px: int, overlap_px: int) -> tuple[int, int]:
    tile, overlap = tile_px // SPATIAL_STRIDE, overlap_px // SPATIAL_STRIDE
    if not 0 < 2 * overlap <= tile:
        raise ValueError(f"overlap of {overlap_px} px, expected 8 to half a tile of {tile_px} px")
    return tile, overlap


def _spans(size: int, tile: int, overlap: int) -> list[slice]:
    """As few evenly spread spans as `tile` allows; they cover `size`, overlap by `overlap` or more, and are no longer
    than that takes."""
    if size <= tile:
        return [slice(0, size)]
    n = -(-(size - overlap) // (tile - overlap))
    length = -(-(size + (n - 1) * overlap) // n)
    starts = (round(i * (size - length) / (n - 1)) for i in range(n))
    return [slice(start, start + length) for start in starts]


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


def _shares(
    ys: Sequence[slice], xs: Sequence[slice], scale: int, ramp: int
) -> Iterator[tuple[tuple[slice, slice], Tensor]]:
    """Every tile with its share [h, w] in its outputs."""
    rows = zip(ys, _weights(ys, scale, ramp), strict=True)
    columns = zip(xs, _weights(xs, scale, ramp), strict=True)
    for (y, weight_y), (x, weight_x) in product(rows, columns):
        yield (y, x), weight_y[:, None] * weight_x
