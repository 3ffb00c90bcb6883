"""What a clip needs in memory beside the weights, and whether the machine has it.

Weights are memory-mapped, so the system can take their pages back when it must; what is counted here cannot be
taken back: activations of one transformer forward, one unpacked weight, what the VAE remembers between chunks and
the working memory of its widest layers. Estimates, meant to be right within a third and rather too high.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mutoscope.engine import devices
from mutoscope.engine.linear import default_compute_dtype
from mutoscope.engine.quants import CHUNK_GPU
from mutoscope.engine.tiling import TILE_PX
from mutoscope.engine.vae import SPATIAL_STRIDE, TEMPORAL_STRIDE
from mutoscope.engine.wan import WanConfig
from mutoscope.errors import ResourceError
from mutoscope.request import GenerationRequest

MIB = 1 << 20
GIB = 1 << 30
FREE_SHARE = 0.8
"""Of the free memory that may be used for keeping weights where nothing was said: others want some too."""
RUNTIME_BYTES = 600 * MIB
"""Measured: 250 MiB of interpreter, torch, libraries and tokenizer, 150 of pages of the libraries' files; the rest for
buffers of fixed size and pages of weights in work. On a GPU, not measured: its context and workspaces of libraries."""
UNPACKING_BYTES_ON_DEVICE = 8 * CHUNK_GPU
"""What unpacking a weight needs there beside its result: float32 scratch, and about as much of fields of bits."""
PROMPT_TOKENS = 130
"""Rows of text for which keys and values are kept: as many as the usual negative prompt has."""
BATCHED_GUIDANCE_TOKENS = 4096
"""Up to this many tokens the guided and the unguided pass run as one batch; above, memory counts more."""
VAE_STATE_BYTES_PER_PIXEL = 57
"""What the causal layers of decoder or encoder remember, per unit of base width and pixel, in 16-bit floats."""
VAE_WORK_BYTES_PER_PIXEL = 100
"""Peak of the tensors alive in the widest layers, per unit of base width and pixel of a tile."""
CLIP_BYTES_PER_PIXEL = 6
"""Three channels at 16 bits: a clip in tiles is put together in memory (see `tiling`)."""

CONDITIONING_BYTES_PER_PIXEL = 7
"""Three channels of frames at 16 bits and one of mask at 8 (see `conditioning`)."""


@dataclass(frozen=True)
class Need:
    """Bytes at the peak of each stage, runtime included. `encode` is that of the conditioning."""

    denoise: int
    decode: int
    encode: int = 0

    @property
    def peak(self) -> int:
        return max(self.encode, self.denoise, self.decode)


def n_tokens(width: int, height: int, frames: int, n_references: int = 0) -> int:
    """Tokens of the transformer: one for each 16 x 16 pixels of a latent frame."""
    latent_frames = 1 + (frames - 1) // TEMPORAL_STRIDE + n_references
    return latent_frames * (width // (2 * SPATIAL_STRIDE)) * (height // (2 * SPATIAL_STRIDE))


def estimate(config: WanConfig, width: int, height: int, frames: int, *, n_references: int = 0, guided: bool = True,
             vae_base_dim: int = 96, itemsize: int = 2) -> Need:  # fmt: skip
    """What one clip needs on top of the weights; `itemsize` is that of the numbers that layers compute with.

    Measured against it in docs/performance.md.
    """
    tokens = n_tokens(width, height, frames, n_references)
    batch = 2 if guided and tokens <= BATCHED_GUIDANCE_TOKENS else 1
    streams = 3 if config.vace_layers else 1  # residual, side branch, context
    per_token = config.dim * (4 * streams + 8 * itemsize) + config.ffn_dim * itemsize
    unpacked_weight = itemsize * config.dim * config.ffn_dim
    n_blocks = config.n_layers + len(config.vace_layers)
    text = 2 * n_blocks * 2 * PROMPT_TOKENS * config.dim * itemsize
    tile = min(width, TILE_PX) * min(height, TILE_PX)
    vae = vae_base_dim * tile * (VAE_STATE_BYTES_PER_PIXEL + VAE_WORK_BYTES_PER_PIXEL)
    if tile < width * height:
        vae += CLIP_BYTES_PER_PIXEL * width * height * frames
    shown = CONDITIONING_BYTES_PER_PIXEL * width * height * frames
    return Need(
        encode=RUNTIME_BYTES + (shown + vae if config.vace_layers else 0),
        denoise=RUNTIME_BYTES + batch * tokens * per_token + unpacked_weight + text,
        decode=RUNTIME_BYTES + vae,
    )


def available(device: torch.device) -> int:
    """Bytes that can be had without swapping."""
    return devices.free_bytes(device)


def allowed(device: torch.device, promised: int | None) -> int | None:
    """What the whole process may use of where it computes; None: what is free on the processor's machine."""
    if devices.has_own_memory(device):
        return devices.allowed_bytes(device, promised, RUNTIME_BYTES)
    return promised


def check(
    config: WanConfig,
    request: GenerationRequest,
    device: torch.device,
    *,
    vae_base_dim: int = 96,
    itemsize: int | None = None,
    promised: int | None = None,
    resident: int = 0,
) -> Need:
    """What the clip needs. Raises ResourceError before any work if it cannot fit.

    promised: bytes that the whole process may use; without it, what is free counts, and the runtime is there already.
    On a device with memory of its own it is about that memory.
    resident: bytes of weights that are there all the time.
    """
    own = devices.has_own_memory(device)
    promised = allowed(device, promised)
    assert request.width is not None and request.height is not None and request.frames is not None  # noqa: PT018

    def need_of(frames: int) -> Need:
        need = estimate(
            config,
            request.width or 0,
            request.height or 0,
            frames,
            n_references=request.conditioning.n_references,
            guided=request.guidance != 1.0,
            vae_base_dim=vae_base_dim,
            itemsize=itemsize or default_compute_dtype(device).itemsize,
        )
        more = resident + (UNPACKING_BYTES_ON_DEVICE if own else 0)
        return Need(need.denoise + more, need.decode + resident, need.encode + resident)

    need = need_of(request.frames)
    what = f"{request.width}x{request.height} with {request.frames} frames needs about"
    if promised is not None:
        if need.peak > promised:
            shorter = range(request.frames - TEMPORAL_STRIDE, 0, -TEMPORAL_STRIDE)
            fits = next((n for n in shorter if need_of(n).peak <= promised), 0)
            instead = f"{fits} frames of this size would fit" if fits else "no clip of this size would fit"
            raise ResourceError(
                f"{what} {need.peak / GIB:.2f} GiB of memory, {promised / GIB:.2f} GiB are allowed"
                f"{f' on {device}' if own else ''}.",
                hint=f"{instead[0].upper()}{instead[1:]}; or ask for a smaller size, or allow more.",
            )
        return need
    more, have = need.peak - RUNTIME_BYTES, available(device)
    if more > have:
        raise ResourceError(
            f"{what} {more / 1e9:.1f} GB of memory, {have / 1e9:.1f} GB are free on {device}.",
            hint="Ask for a smaller size or fewer frames, or close other programs.",
        )
    return need


def room(need: Need, device: torch.device, promised: int | None, *, now: int) -> int:
    """Bytes left for keeping weights while a stage that needs `now` runs."""
    promised = allowed(device, promised)
    if promised is not None:
        return max(0, promised - now)
    return max(0, int(FREE_SHARE * available(device)) - (need.peak - RUNTIME_BYTES))
