"""WanModel against diffusers' WanTransformer3DModel and WanVACETransformer3DModel; then our shortcuts."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel, WanVACETransformer3DModel
from torch import Tensor, nn

from mutoscope.engine import wan
from mutoscope.engine.attention import attend
from mutoscope.engine.wan import TextContext, WanModel, rope_table
from mutoscope.engine.weights import load_wan

HEADS, HEAD_DIM = 3, 28  # 28 gives time another share of the rotary dims (12) than rows and columns (8)
TEXT_ROWS = 32
SHAPE = dict(
    num_attention_heads=HEADS, attention_head_dim=HEAD_DIM, text_dim=48, freq_dim=32, ffn_dim=96, num_layers=4
)  # fmt: skip
VACE_LAYERS = [0, 1, 3]
METADATA = {"wan.attention.head_count": str(HEADS), "wan.text_length": str(TEXT_ROWS)}


class Case(SimpleNamespace):
    """A clip of 3 x 8 x 12 latents, two samples with prompts of 5 and 9 rows at noise level 700."""

    x: Tensor
    context: Tensor
    rows: Tensor
    lengths: list[int]
    t: Tensor
    rope: Tensor


@pytest.fixture
def case() -> Case:
    rng = torch.Generator().manual_seed(1)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng)

    lengths = [5, 9]
    rows = noise(2, TEXT_ROWS, 48)
    for b, length in enumerate(lengths):
        rows[b, length:] = 0
    return Case(
        x=noise(2, 16, 3, 8, 12), context=noise(2, 96, 3, 8, 12), rows=rows, lengths=lengths,
        t=torch.tensor([700, 700]), rope=rope_table((3, 4, 6), HEAD_DIM),
    )  # fmt: skip


@pytest.fixture
def t2v(randomise: Callable[..., nn.Module]) -> nn.Module:
    return randomise(WanTransformer3DModel(**SHAPE))


@pytest.fixture
def vace(randomise: Callable[..., nn.Module]) -> nn.Module:
    return randomise(WanVACETransformer3DModel(**SHAPE, vace_layers=VACE_LAYERS, vace_in_channels=96))


@pytest.fixture
def ours_of(save: Callable[..., object]) -> Callable[[nn.Module], WanModel]:
    def load(reference: nn.Module) -> WanModel:
        metadata = dict(METADATA)
        if hasattr(reference, "vace_blocks"):
            metadata["wan.vace.layers"] = str(VACE_LAYERS)
        return load_wan(save(reference.state_dict(), metadata), compute_dtype=torch.float32)

    return load


def run_ours(model: WanModel, case: Case, strength: float | None = None) -> Tensor:
    time = model.time_modulation(case.t)
    text = model.text_context(case.rows, case.lengths)
    vace = None if strength is None else model.vace_tokens(case.context)
    return model(case.x, time, text, case.rope, vace, 1.0 if strength is None else strength)


def run_reference(model: nn.Module, case: Case, strength: float | None = None) -> Tensor:
    control = {}
    if strength is not None:
        scale = torch.full((len(VACE_LAYERS),), strength)
        control = dict(control_hidden_states=case.context, control_hidden_states_scale=scale)
    return model(case.x, case.t, case.rows, **control).sample


def test_text_to_video(t2v, ours_of, case, assert_close):
    assert_close(run_ours(ours_of(t2v), case), run_reference(t2v, case))


@pytest.mark.parametrize("strength", [1.0, 0.6])
def test_vace(vace, ours_of, case, assert_close, strength):
    assert_close(run_ours(ours_of(vace), case, strength), run_reference(vace, case, strength))


def test_diffusers_skips_nothing_that_we_run(vace, ours_of, case, assert_broken):
    """The side branch must matter in this comparison, else agreement means nothing."""
    assert_broken(run_ours(ours_of(vace), case), run_reference(vace, case, 1.0))


# ---------------------------------------------------------------- mutants: each must break the comparison


def swap_shift_and_scale(model: WanModel, monkeypatch: pytest.MonkeyPatch) -> None:
    for block in model.blocks:
        block.modulation.data = block.modulation.data[:, [1, 0, 2, 3, 4, 5]]


def swap_rope_axes(model: WanModel, monkeypatch: pytest.MonkeyPatch) -> None:
    table = rope_table((3, 6, 4), HEAD_DIM).view(2, 3, 6, 4, -1).transpose(2, 3).flatten(1, 3)
    true_rope = wan.apply_rope
    monkeypatch.setattr(wan, "apply_rope", lambda x, rope: true_rope(x, table))


def rotate_halves(model: WanModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def apply(x: Tensor, rope: Tensor) -> Tensor:
        cos, sin = rope[0, None, :, None, :], rope[1, None, :, None, :]
        low, high = x.chunk(2, dim=-1)
        return torch.cat((low * cos - high * sin, low * sin + high * cos), dim=-1)

    monkeypatch.setattr(wan, "apply_rope", apply)


def head_channels_slowest(model: WanModel, monkeypatch: pytest.MonkeyPatch) -> None:
    head = model.head.head
    order = torch.arange(64).view(16, 4).t().flatten()
    model.head.head = nn.Linear(head.in_features, 64)
    model.head.head.weight.data = head.weight.values(torch.float32)[order]
    model.head.head.bias.data = head.bias[order]


def norm_per_head(model: WanModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(norm: wan.RMSNorm, x: Tensor) -> Tensor:
        y = x.unflatten(-1, (HEADS, -1))
        return (y * (y.pow(2).mean(-1, keepdim=True) + norm.eps).rsqrt()).flatten(-2) * norm.weight

    monkeypatch.setattr(wan.RMSNorm, "forward", forward)


def padding_counts_once(model: WanModel, monkeypatch: pytest.MonkeyPatch) -> None:
    def weightless_padding(*args: Any, **options: Any) -> TextContext:
        text = WanModel.text_context(model, *args, **options)
        text.bias_B11S[..., -1] = 0
        return text

    monkeypatch.setattr(model, "text_context", weightless_padding)


def padding_ignored(model: WanModel, monkeypatch: pytest.MonkeyPatch) -> None:
    object.__setattr__(model.config, "text_length", 0)


def head_takes_wrong_modulation(model: WanModel, monkeypatch: pytest.MonkeyPatch) -> None:
    true_forward = wan.Head.forward
    monkeypatch.setattr(wan.Head, "forward", lambda head, x, e: true_forward(head, x, e.roll(1, -1)))


def exact_gelu(model: WanModel, monkeypatch: pytest.MonkeyPatch) -> None:
    functions = SimpleNamespace(**{**vars(F), "gelu": lambda x, approximate: F.gelu(x)})
    monkeypatch.setattr(wan, "F", functions)


@pytest.mark.parametrize(
    "mutate",
    [swap_shift_and_scale, swap_rope_axes, rotate_halves, head_channels_slowest, norm_per_head,
     padding_counts_once, padding_ignored, head_takes_wrong_modulation],
)  # fmt: skip
def test_mutant_of_the_model_is_caught(t2v, ours_of, case, assert_broken, monkeypatch, mutate):
    model = ours_of(t2v)
    mutate(model, monkeypatch)
    assert_broken(run_ours(model, case), run_reference(t2v, case))


def test_the_wrong_gelu_is_caught(t2v, ours_of, case, relative_error, monkeypatch):
    """The mildest mutant: tanh approximation or not. It still shows, at 6.8e-5."""
    model = ours_of(t2v)
    exact_gelu(model, monkeypatch)
    assert relative_error(run_ours(model, case), run_reference(t2v, case)) > 3e-5


@pytest.mark.parametrize("layers", [(0, 1, 2), (1, 2, 3)])
def test_hints_at_the_wrong_blocks_are_caught(vace, ours_of, case, assert_broken, layers):
    model = ours_of(vace)
    object.__setattr__(model.config, "vace_layers", layers)
    assert_broken(run_ours(model, case, 1.0), run_reference(vace, case, 1.0))


# ---------------------------------------------------------------- optimisations that change nothing


def test_one_padding_key_equals_all_padding_rows(t2v, ours_of, case, assert_close):
    model = ours_of(t2v)
    every_row = model.text_context(case.rows, [TEXT_ROWS, TEXT_ROWS])
    assert every_row.keys[0].shape[1] >= TEXT_ROWS
    assert model.text_context(case.rows[:, :9], case.lengths).keys[0].shape[1] == 9 + 1
    time = model.time_modulation(case.t)
    assert_close(run_ours(model, case), model(case.x, time, every_row, case.rope))


def test_rows_after_the_length_are_ignored(t2v, ours_of, case):
    model = ours_of(t2v)
    clean = run_ours(model, case)
    case.rows[0, case.lengths[0] : case.lengths[1]] = 9.0
    torch.testing.assert_close(run_ours(model, case), clean, rtol=0, atol=0)


def test_a_batch_equals_its_samples(vace, ours_of, case, assert_close):
    model = ours_of(vace)
    time = model.time_modulation(case.t[:1])
    text = model.text_context(case.rows, case.lengths)
    tokens = model.vace_tokens(case.context)
    together = run_ours(model, case, 1.0)
    for b in (0, 1):
        alone = model(case.x[b : b + 1], time, text.slice(b, b + 1), case.rope, tokens[b : b + 1])
        assert_close(alone, together[b : b + 1])


def test_text_context_is_the_same_for_every_step(vace, ours_of, case):
    """Computed once per clip: using it must not change it."""
    model = ours_of(vace)
    text = model.text_context(case.rows, case.lengths)
    tokens = model.vace_tokens(case.context)
    for t in (900, 500, 100):
        time = model.time_modulation(torch.tensor([t, t]))
        fresh = model.text_context(case.rows, case.lengths)
        cached = model(case.x, time, text, case.rope, tokens)
        torch.testing.assert_close(cached, model(case.x, time, fresh, case.rope, tokens), rtol=0, atol=0)


def test_time_modulation_of_a_schedule_equals_its_steps(t2v, ours_of, assert_close):
    model = ours_of(t2v)
    schedule = torch.tensor([999.0, 640.5, 12.25])
    together = model.time_modulation(schedule)
    for i, t in enumerate(schedule):
        alone = model.time_modulation(t[None])
        assert_close(together.e0[i : i + 1], alone.e0)
        assert_close(together.e[i : i + 1], alone.e)


def hints_first(model: WanModel, case: Case, text: TextContext, strength: float) -> Tensor:
    """The official order of VACE: all hints are computed before the first main block."""
    time, x = model.time_modulation(case.t), model.patch_embedding(case.x)
    n, c, hints = model.config.n_layers, None, {}
    for m, (i, side) in enumerate(zip(model.config.vace_layers, model.vace_blocks, strict=True)):
        c = side.before_proj(model.vace_tokens(case.context)) + x if m == 0 else c
        c = side(c, time.e0, case.rope, text.keys[n + m], text.values[n + m], text.bias_B11S)
        hints[i] = side.after_proj(c)
    for i, block in enumerate(model.blocks):
        x = block(x, time.e0, case.rope, text.keys[i], text.values[i], text.bias_B11S)
        x = x + strength * hints[i] if i in hints else x
    out = model.head(x, time.e).view(2, 3, 4, 6, 2, 2, 16)
    return out.permute(0, 6, 1, 2, 4, 3, 5).reshape(case.x.shape)


def test_interleaved_hints_equal_hints_first(vace, ours_of, case, assert_close):
    model = ours_of(vace)
    text = model.text_context(case.rows, case.lengths)
    assert_close(run_ours(model, case, 0.7), hints_first(model, case, text, 0.7))


def test_strength_zero_equals_a_skipped_side_branch(vace, ours_of, case):
    model = ours_of(vace)
    skipped = run_ours(model, case)
    text = model.text_context(case.rows, case.lengths, vace=False)
    assert len(text.keys) == model.config.n_layers
    time = model.time_modulation(case.t)
    torch.testing.assert_close(run_ours(model, case, 0.0), skipped, rtol=0, atol=0)
    torch.testing.assert_close(model(case.x, time, text, case.rope), skipped, rtol=0, atol=0)


def test_attention_equals_its_definition(assert_close):
    rng = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(2, n, 3, 8, generator=rng) for n in (6, 5, 5))
    bias = torch.randn(2, 1, 1, 5, generator=rng)
    logits = torch.einsum("blhd,bshd->bhls", q.double(), k.double()) / 8**0.5 + bias
    expected = torch.einsum("bhls,bshd->blhd", logits.softmax(-1), v.double())
    assert_close(attend(q, k, v, bias), expected)
