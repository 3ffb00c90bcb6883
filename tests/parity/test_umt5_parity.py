"""UMT5Encoder against transformers' UMT5EncoderModel, from its own weight names and from Wan's .pth names."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import UMT5Config, UMT5EncoderModel

from mutoscope.engine import umt5
from mutoscope.engine.umt5 import UMT5Encoder
from mutoscope.engine.weights import load_umt5

LENGTHS = [40, 150]  # beyond max_distance 128, so that every bucket occurs
TO_WAN = {
    r"shared\.": "token_embedding.",
    r"encoder\.final_layer_norm\.": "norm.",
    r"encoder\.block\.": "blocks.",
    r"layer\.0\.SelfAttention\.relative_attention_bias\.": "pos_embedding.embedding.",
    r"layer\.0\.SelfAttention\.": "attn.",
    r"layer\.0\.layer_norm\.": "norm1.",
    r"layer\.1\.layer_norm\.": "norm2.",
    r"layer\.1\.DenseReluDense\.wi_0\.": "ffn.gate.0.",
    r"layer\.1\.DenseReluDense\.wi_1\.": "ffn.fc1.",
    r"layer\.1\.DenseReluDense\.wo\.": "ffn.fc2.",
}


@pytest.fixture
def reference(randomise: Callable[..., nn.Module]) -> nn.Module:
    config = UMT5Config(
        vocab_size=100, d_model=48, d_kv=16, d_ff=80, num_layers=3, num_heads=3, dropout_rate=0.0,
        feed_forward_proj="gated-gelu", is_gated_act=True, dense_act_fn="gelu_new",
    )  # fmt: skip
    return randomise(UMT5EncoderModel(config))


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(3, 100, (2, max(LENGTHS)), generator=torch.Generator().manual_seed(4))


def run_reference(reference: nn.Module, ids: Tensor) -> Tensor:
    mask = torch.arange(ids.shape[1])[None] < torch.tensor(LENGTHS)[:, None]
    return reference(ids, attention_mask=mask.long()).last_hidden_state


def real_rows(rows: Tensor) -> Tensor:
    return torch.cat([rows[b, :length] for b, length in enumerate(LENGTHS)])


def load(path: Path) -> UMT5Encoder:
    return load_umt5(path, compute_dtype=torch.float32)[0]


def test_encoder(reference, save, ids, assert_close):
    model = load(save(reference.state_dict()))
    assert_close(real_rows(model(ids, LENGTHS)), real_rows(run_reference(reference, ids)))


def test_wan_names(reference, save, ids, assert_close):
    renamed = {}
    for name, values in reference.state_dict().items():
        for theirs, wans in TO_WAN.items():
            name = re.sub(theirs, wans, name)
        renamed[name] = values
    del renamed["encoder.embed_tokens.weight"]
    assert not any(name.startswith("encoder") for name in renamed)
    assert_close(real_rows(load(save(renamed))(ids, LENGTHS)), real_rows(run_reference(reference, ids)))


def test_only_real_tokens_need_encoding(reference, save, ids, assert_close):
    model = load(save(reference.state_dict()))
    padded = model(ids, LENGTHS)
    for b, length in enumerate(LENGTHS):
        assert_close(model(ids[b : b + 1, :length])[0], padded[b, :length])


# ---------------------------------------------------------------- mutants: each must break the comparison


def buckets_off_by_one(model: UMT5Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    true_buckets = umt5.relative_buckets
    monkeypatch.setattr(umt5, "relative_buckets", lambda n, b, d: (true_buckets(n, b, d) - 1).clamp(min=0))


def buckets_of_query_minus_key(model: UMT5Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    true_buckets = umt5.relative_buckets
    monkeypatch.setattr(umt5, "relative_buckets", lambda n, b, d: true_buckets(n, b, d).t())


def shorter_distance(model: UMT5Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    true_buckets = umt5.relative_buckets
    monkeypatch.setattr(umt5, "relative_buckets", lambda n, b, d: true_buckets(n, b, 64))


def one_table_for_all_layers(model: UMT5Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    for layer in model.enc.blk:
        layer.attn_rel_b = model.enc.blk[0].attn_rel_b


def scaled_logits(model: UMT5Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    true_attend = umt5.attend
    monkeypatch.setattr(umt5, "attend", lambda q, k, v, bias, scale: true_attend(q, k, v, bias))


def padding_attended(model: UMT5Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    true_forward = model.forward
    monkeypatch.setattr(model, "forward", lambda ids, lengths: true_forward(ids))


def gate_and_up_swapped(model: UMT5Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    for layer in model.enc.blk:
        layer.ffn_gate, layer.ffn_up = layer.ffn_up, layer.ffn_gate


def exact_gelu(model: UMT5Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    gelu = SimpleNamespace(**{**vars(F), "gelu": lambda x, approximate: F.gelu(x)})
    monkeypatch.setattr(umt5, "F", gelu)


@pytest.mark.parametrize(
    "mutate",
    [buckets_off_by_one, buckets_of_query_minus_key, shorter_distance, one_table_for_all_layers,
     scaled_logits, padding_attended, gate_and_up_swapped],
)  # fmt: skip
def test_mutant_is_caught(reference, save, ids, assert_broken, monkeypatch, mutate):
    model = load(save(reference.state_dict()))
    expected = run_reference(reference, ids)
    mutate(model, monkeypatch)
    assert_broken(real_rows(model(ids, LENGTHS)), real_rows(expected))


def test_the_wrong_gelu_is_caught(reference, save, ids, relative_error, monkeypatch):
    model = load(save(reference.state_dict()))
    expected = run_reference(reference, ids)
    exact_gelu(model, monkeypatch)
    assert relative_error(real_rows(model(ids, LENGTHS)), real_rows(expected)) > 3e-5
