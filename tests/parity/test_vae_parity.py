"""WanVAE against diffusers' AutoencoderKLWan; then chunks, trimming and tiles against the whole."""

from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from torch import Tensor, nn

from mutoscope.engine import vae as vae_module
from mutoscope.engine.tiling import _spans, _weights, decode_tiled, encode_tiled
from mutoscope.engine.vae import CausalConv3d, Stream, Upsample, WanVAE
from mutoscope.engine.weights import load_vae

MEAN, STD = [0.1, -0.4, 0.7, 0.0], [1.5, 0.8, 2.0, 1.0]
METADATA = {"vae.latent_mean": str(MEAN), "vae.latent_std": str(STD)}


@pytest.fixture
def reference(randomise: Callable[..., nn.Module]) -> nn.Module:
    config = dict(base_dim=8, z_dim=4, dim_mult=[1, 2, 4, 4], temperal_downsample=[False, True, True])
    return randomise(AutoencoderKLWan(**config, num_res_blocks=2))


@pytest.fixture
def ours(reference: nn.Module, save: Callable[..., object]) -> WanVAE:
    return load_vae(save(reference.state_dict(), METADATA), compute_dtype=torch.float32)


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


def statistics() -> tuple[Tensor, Tensor]:
    return torch.tensor(MEAN).view(1, -1, 1, 1, 1), torch.tensor(STD).view(1, -1, 1, 1, 1)


def reference_encode(reference: nn.Module, video: Tensor) -> Tensor:
    mean, std = statistics()
    return (reference.encode(video).latent_dist.mode() - mean) / std


def reference_decode(reference: nn.Module, latents: Tensor) -> Tensor:
    mean, std = statistics()
    return reference.decode(latents * std + mean).sample


def video_of(n_frames: int) -> Tensor:
    return noise(2, 3, n_frames, 32, 48).clamp(-1, 1)


def latents_of(n_frames: int) -> Tensor:
    return noise(2, 4, 1 + (n_frames - 1) // 4, 4, 6)


@pytest.mark.parametrize("n_frames", [1, 17])
def test_encode(reference, ours, assert_close, n_frames):
    assert_close(ours.encode(video_of(n_frames)), reference_encode(reference, video_of(n_frames)))


@pytest.mark.parametrize("n_frames", [1, 17])
def test_decode(reference, ours, assert_close, n_frames):
    expected = reference_decode(reference, latents_of(n_frames))
    assert (expected.abs() < 1).float().mean() > 0.5, "clamping must not hide the comparison"
    assert_close(ours.decode(latents_of(n_frames)), expected)


# ---------------------------------------------------------------- mutants: each must break the comparison


def swap_upsampled_halves(vae: WanVAE, monkeypatch: pytest.MonkeyPatch) -> None:
    for layer in vae.decoder.upsamples:
        if isinstance(layer, Upsample) and layer.time_conv is not None:
            for values in (layer.time_conv.weight.data, layer.time_conv.bias.data):
                values.copy_(values.roll(len(values) // 2, 0))


def remember_the_first_frame(vae: WanVAE, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the 'Rep' rule: the first doubled chunk sees the first frame as its past."""
    true_forward = Upsample.forward

    def forward(layer: Upsample, x: Tensor, stream: Stream) -> Tensor:
        if layer.time_conv is not None and layer not in stream:
            stream[layer.time_conv] = F.pad(x, (0, 0, 0, 0, 1, 0))
        return true_forward(layer, x, stream)

    monkeypatch.setattr(Upsample, "forward", forward)


def repeat_the_first_frame_as_past(vae: WanVAE, monkeypatch: pytest.MonkeyPatch) -> None:
    true_forward = CausalConv3d.forward

    def forward(conv: CausalConv3d, x: Tensor, stream: Stream, norm: nn.Module | None = None) -> Tensor:
        if conv not in stream and conv.weight.shape[2] > 1:
            first = x[:, :, :1] if norm is None else F.silu(norm(x[:, :, :1]))
            stream[conv] = first.repeat(1, 1, 2, 1, 1)
        return true_forward(conv, x, stream, norm)

    monkeypatch.setattr(CausalConv3d, "forward", forward)


def norm_over_the_frame(vae: WanVAE, monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(norm: nn.Module, x: Tensor) -> Tensor:
        return x * (x.pow(2).mean().rsqrt() * norm.gamma)

    monkeypatch.setattr(vae_module.RMSNorm, "forward", forward)


def statistics_ignored(vae: WanVAE, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vae, "_statistics", lambda like: (torch.zeros(1), torch.ones(1)))


def pad_both_sides(vae: WanVAE, monkeypatch: pytest.MonkeyPatch) -> None:
    true_pad = F.pad
    monkeypatch.setattr(vae_module.F, "pad", lambda x, widths: true_pad(x, widths).roll((1, 1), (-2, -1)))


DECODER = [swap_upsampled_halves, remember_the_first_frame, repeat_the_first_frame_as_past,
           norm_over_the_frame, statistics_ignored]  # fmt: skip
ENCODER = [pad_both_sides, repeat_the_first_frame_as_past, norm_over_the_frame, statistics_ignored]


@pytest.mark.parametrize("mutate", DECODER)
def test_mutant_of_the_decoder_is_caught(reference, ours, assert_broken, monkeypatch, mutate):
    expected = reference_decode(reference, latents_of(17))
    mutate(ours, monkeypatch)
    assert_broken(ours.decode(latents_of(17)), expected)


@pytest.mark.parametrize("mutate", ENCODER)
def test_mutant_of_the_encoder_is_caught(reference, ours, assert_broken, monkeypatch, mutate):
    expected = reference_encode(reference, video_of(17))
    mutate(ours, monkeypatch)
    assert_broken(ours.encode(video_of(17)), expected)


# ---------------------------------------------------------------- optimisations that change nothing


@pytest.mark.parametrize("chunk", [4, 8, 16])
def test_chunks_of_frames_encode_like_the_whole(ours, assert_close, chunk):
    assert_close(ours.encode(video_of(17), chunk), ours.encode(video_of(17), 16))


@pytest.mark.parametrize("chunk", [1, 2, 3])
def test_chunks_of_latents_decode_like_the_whole(ours, assert_close, chunk):
    assert_close(ours.decode(latents_of(17), chunk), ours.decode(latents_of(17), 4))


def test_later_frames_do_not_change_earlier_ones(ours, assert_close):
    assert_close(ours.encode(video_of(17)[:, :, :9]), ours.encode(video_of(17))[:, :, :3])
    assert_close(ours.decode(latents_of(17)[:, :, :3]), ours.decode(latents_of(17))[:, :, :9])


def test_unused_temporal_taps_are_trimmed(reference, save, assert_close):
    """Convolutions that never look back become spatial ones, same numbers; the resampling ones stay."""
    tensors = reference.state_dict()
    for name, values in tensors.items():
        if values.shape[2:] == (3, 3, 3) and ("down_blocks" in name or "up_blocks" in name):
            values[:, :, :2] = 0
    trimmed = load_vae(save(tensors, METADATA), compute_dtype=torch.float32)
    assert trimmed.encoder.downsamples[0].residual["2"].weight.shape[2:] == (1, 3, 3)
    assert trimmed.decoder.conv1.weight.shape[2:] == (3, 3, 3)
    resampling = [layer.time_conv for layer in trimmed.modules() if getattr(layer, "time_conv", None)]
    assert [conv.weight.shape[2] for conv in resampling] == [3] * 4
    assert_close(trimmed.encode(video_of(9)), reference_encode(reference, video_of(9)))
    assert_close(trimmed.decode(latents_of(9)), reference_decode(reference, latents_of(9)))


def test_what_is_remembered_stays_where_it_is(ours):
    """Two frames, zeros before a first one; memory does not wander with the frames."""
    conv, stream, places = ours.decoder.conv1, Stream(), []
    frames = noise(1, 4, 4, 3, 5)
    for chunk in (frames[:, :, :1], frames[:, :, 1:2], frames[:, :, 2:]):
        conv(chunk, stream)
        places.append(stream[conv].data_ptr())
        if len(places) == 1:
            torch.testing.assert_close(stream[conv], F.pad(chunk, (0, 0, 0, 0, 1, 0)), rtol=0, atol=0)
    torch.testing.assert_close(stream[conv], frames[:, :, 2:], rtol=0, atol=0)
    assert len(set(places)) == 1


# ---------------------------------------------------------------- tiles


def psnr_db(got: Tensor, expected: Tensor) -> float:
    return -10 * math.log10((got - expected).pow(2).mean().item() / 4)  # values span 2


def test_one_tile_is_the_whole(ours):
    latents, video = latents_of(9), video_of(9)
    tiled = torch.cat(list(decode_tiled(ours, latents, tile_px=64, overlap_px=16)), dim=2)
    torch.testing.assert_close(tiled, ours.decode(latents), rtol=0, atol=0)
    chunks = [video[:, :, :1], video[:, :, 1:5], video[:, :, 5:]]
    tiled = torch.cat(list(encode_tiled(ours, chunks, tile_px=64, overlap_px=16)), dim=2)
    torch.testing.assert_close(tiled, ours.encode(video), rtol=0, atol=0)


@pytest.fixture
def local(ours: WanVAE) -> WanVAE:
    """Without what looks at the whole frame, the attention, so that a tile can know what it shows."""
    for block in (ours.encoder.middle[1], ours.decoder.middle[1]):
        block.proj.weight.data.zero_()
    return ours


def test_tiles_frames_come_like_those_of_a_stream(ours):
    pieces = list(decode_tiled(ours, noise(1, 4, 3, 10, 12), tile_px=64, overlap_px=16))
    assert [tuple(p.shape) for p in pieces] == [(1, 3, n, 80, 96) for n in (1, 4, 4)]


def test_seams_of_decoded_tiles_are_small(local):
    latents = noise(1, 4, 2, 16, 20)
    whole = local.decode(latents)
    tiled = torch.cat(list(decode_tiled(local, latents, tile_px=128, overlap_px=64)), dim=2)
    assert psnr_db(tiled, whole) > 25
    cut = torch.cat((local.decode(latents[..., :10]), local.decode(latents[..., 10:])), dim=-1)
    assert psnr_db(tiled, whole) > psnr_db(cut, whole) + 3, "blending must beat cutting"


def test_seams_of_encoded_tiles_are_small(local):
    video = noise(1, 3, 5, 128, 192).clamp(-1, 1)
    whole = local.encode(video)
    tiled = torch.cat(
        list(encode_tiled(local, [video[:, :, :1], video[:, :, 1:]], tile_px=128, overlap_px=64)), dim=2
    )
    assert psnr_db(tiled, whole) > 25


def test_tiles_are_no_larger_than_their_overlap_wants() -> None:
    for size in range(9, 60):
        spans = _spans(size, 8, 4)
        assert (spans[0].start, spans[-1].stop) == (0, size)
        assert len({span.stop - span.start for span in spans}) == 1
        assert all(a.stop - b.start >= 4 for a, b in itertools.pairwise(spans))
        assert sum(span.stop - span.start for span in spans) < size + 4 * (len(spans) - 1) + len(spans)
        assert len(spans) == -(-(size - 4) // (8 - 4))


def test_shares_of_all_tiles_are_one():
    """Also where three tiles meet, and linear across a seam of two."""
    for size in (9, 12, 15, 16, 23, 40):
        spans = _spans(size, 8, 4)
        total = torch.zeros(size * 8)
        for span, weight in zip(spans, _weights(spans, 8, 32), strict=True):
            total[span.start * 8 : span.stop * 8] += weight
        torch.testing.assert_close(total, torch.ones(size * 8))
    first, _ = _weights(_spans(12, 8, 4), 8, 32)
    torch.testing.assert_close(first[32:], (torch.arange(32).flip(0) + 0.5) / 32)


def test_one_tile_is_remembered_at_a_time(ours, monkeypatch):
    """Streams do not pile up: that of a finished tile is gone when the next begins."""
    alive: weakref.WeakSet[Tracked] = weakref.WeakSet()
    most = 0

    class Tracked(Stream):
        __hash__ = object.__hash__

        def __init__(self) -> None:
            nonlocal most
            super().__init__()
            alive.add(self)
            most = max(most, len(alive))

    monkeypatch.setattr(vae_module, "Stream", Tracked)
    list(decode_tiled(ours, noise(1, 4, 2, 12, 14), tile_px=64, overlap_px=16))
    assert most == 1


def test_no_layer_sees_more_than_a_tile(ours, monkeypatch):
    """The working memory is that of one tile, whatever the frame."""
    seen = []
    true_conv = F.conv3d

    def conv3d(x: Tensor, *args: object, **options: object) -> Tensor:
        seen.append(x.shape[-2:])
        return true_conv(x, *args, **options)

    monkeypatch.setattr(vae_module.F, "conv3d", conv3d)
    list(decode_tiled(ours, noise(1, 4, 2, 12, 14), tile_px=64, overlap_px=16))
    list(encode_tiled(ours, [noise(1, 3, 1, 96, 112)], tile_px=64, overlap_px=16))
    largest = max(height * width for height, width in seen)
    assert largest == 56 * 64  # 12 latents are two tiles of 7, 14 two of 8


@pytest.mark.parametrize(("tile_px", "overlap_px"), [(64, 0), (64, 40), (8, 8)])
def test_useless_overlaps_are_refused(ours, tile_px, overlap_px):
    with pytest.raises(ValueError, match="half a tile"):
        next(decode_tiled(ours, latents_of(1), tile_px, overlap_px))
