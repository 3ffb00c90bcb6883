"""The trainer's own mathematics: processes that train together, and what VACE tasks show."""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor, nn

from training import captions, data, optim, pca, reader, tasks, train_dit, train_text

PROCESSES = 2


def _model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))


def _examples() -> Tensor:
    return torch.randn(PROCESSES, 5, 6, generator=torch.Generator().manual_seed(1))


def _gradients(model: nn.Sequential, examples: list[Tensor]) -> list[Tensor]:
    torch.stack([model(x).square().mean() for x in examples]).mean().backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def _muon_step(model: nn.Sequential) -> None:
    generator = torch.Generator().manual_seed(2)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)
    optim.Muon([p for p in model.parameters() if p.dim() == 2], lr=0.1).step()


def _process(rank: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=PROCESSES)
    model = _model()
    gradients = _gradients(model, [_examples()[rank]])
    train_dit.average_gradients(model)
    averaged = [g.clone() for g in gradients]
    _muon_step(model)
    number = train_dit.same_everywhere(float(rank + 3))
    torch.save(
        {"gradients": averaged, "weights": list(model.parameters()), "number": number}, f"{folder}/{rank}.pt"
    )
    dist.destroy_process_group()


def test_two_processes_train_as_one_with_both_batches(tmp_path: Path) -> None:
    """Gradients are the mean's, as closely as bfloat16 carries them; shared-out Muon steps are those of one process."""
    torch.multiprocessing.spawn(_process, (str(tmp_path),), nprocs=PROCESSES)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in range(PROCESSES))
    assert first["number"] == second["number"] == 3.0
    for a, b, alone in zip(
        first["gradients"], second["gradients"], _gradients(_model(), list(_examples())), strict=True
    ):
        assert torch.equal(a, b)
        assert (a - alone).norm() < 0.01 * alone.norm()
    stepped = _model()
    _muon_step(stepped)
    for a, b, alone in zip(first["weights"], second["weights"], stepped.parameters(), strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, alone, atol=2e-3, rtol=0)  # a step is .1, orthogonalised in bfloat16


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> train_dit.Examples:
    root = tmp_path_factory.mktemp("clips")
    data.make_shard(root / "clips" / "0000", 1, level="full", n=6, frames=9, size=(32, 32))
    code = pca.fit(np.array(data.shards(root, "clips")[0].frames))

    class Letters:
        def encode(self, text: str) -> list[int]:
            return [2 + ord(c) % 50 for c in text]

    return train_dit.Examples(root, "clips", code, Letters(), seed=3)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", tasks.NAMES)
def test_vace_context_is_the_code_of_what_is_kept_and_what_is_made(
    examples: train_dit.Examples, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clips that show nothing are not encoded one by one; the numbers are those of the definition all the same."""
    shard = examples.shards[0]
    assert shard.boxes is not None
    shown = [tasks.task(name, np.random.default_rng(i), shard.frames[i], shard.boxes[i]) for i in range(3)]
    given = iter(shown)
    monkeypatch.setattr(tasks, "random_task", lambda *_: next(given))
    monkeypatch.setattr(train_dit, "PAIRS_BY_TEXT", 0.0)
    batch = {"index": torch.arange(3)}
    context = examples.vace_context(batch)
    assert batch["shown"].tolist() == [s.guides or not s.mask.all() for s in shown]
    video = torch.from_numpy(np.stack([s.frames for s in shown])).permute(0, 4, 1, 2, 3) / 127.5 - 1
    mask = torch.from_numpy(np.stack([s.mask for s in shown]))[:, None]
    assert context.shape == (3, 96, 3, 4, 4)
    for part, wanted in ((context[:, :16], video * (1 - mask)), (context[:, 16:32], video * mask)):
        expected = pca.marked(examples.code.encode(wanted))
        torch.testing.assert_close(part, expected, atol=2e-5, rtol=2e-5)


def test_conditioning_marks_the_borders_and_the_first_frame_and_what_is_made_does_not(
    examples: train_dit.Examples,
) -> None:
    z = torch.zeros(2, pca.Z, 3, 4, 5)
    marks = pca.marked(z)
    assert not z.any(), "the codes that are made from stay as they are"
    assert marks[1, pca.ACROSS, 2].tolist() == [[1, 0, 0, 0, -1]] * 4
    assert marks[1, pca.DOWN, 2].T.tolist() == [[1, 0, 0, -1]] * 5
    assert marks[1, pca.FIRST].mean((1, 2)).tolist() == [1, 0, 0]
    assert marks.abs().sum() == 2 * (3 * 4 * 2 + 3 * 5 * 2 + 4 * 5), "and nothing else"
    batch = examples.next(2)
    video = (
        torch.from_numpy(examples.shards[0].frames[batch["index"].tolist()]).permute(0, 4, 1, 2, 3) / 127.5
        - 1
    )
    torch.testing.assert_close(batch["x"], examples.code.encode(video), atol=2e-2, rtol=2e-3)
    reference = examples.add_reference(batch)
    assert reference.shape == (2, 96, 4, 4, 4)
    assert batch["x"].shape == (2, 16, 4, 4, 4)
    torch.testing.assert_close(reference[:, :16, 0], pca.marked(batch["x"][:, :, :1])[:, :, 0])
    gray = examples.code.encode(torch.zeros(1, 3, 9, 32, 32))
    torch.testing.assert_close(reference[:, :16, 1:], pca.marked(gray).expand(2, -1, -1, -1, -1))


def test_a_reader_learns_to_tell_shapes_and_sees_what_a_decoder_blurs(tmp_path: Path) -> None:
    data.make_shard(tmp_path / "data" / "clips" / "0000", 1, level="first", n=48, frames=5, size=(32, 32))
    told = argparse.Namespace(
        data=tmp_path / "data", out=tmp_path / "reader.pt", minutes=5, steps=150, batch=48, lr=0.004, seed=0
    )
    assert reader.train(told) > 0.6, "of six shapes"
    looks = reader.load(told.out)
    shard = data.shards(tmp_path / "data", "clips")[0]
    true = torch.from_numpy(np.array(shard.frames[:4])).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
    mask = torch.ones(4, 1, 5, 32, 32)
    assert looks.difference(true, true, mask) == 0
    blurred = nn.functional.avg_pool3d(
        true, (1, 5, 5), 1, (0, 2, 2), count_include_pad=False
    ).requires_grad_()
    difference = looks.difference(blurred, true, mask)
    assert difference > 1.5 * looks.difference((blurred.detach() + true) / 2, true, mask) > 0
    difference.backward()
    assert blurred.grad is not None
    sharper = blurred.detach() - 0.1 * blurred.grad / blurred.grad.abs().max()
    assert looks.difference(sharper, true, mask) < difference, "a decoder can follow it"


def test_what_is_hard_to_see_is_drawn_oftener_for_the_decoder(examples: train_dit.Examples) -> None:
    classes = examples.shards[0].classes
    share = captions.shares(classes, reader.HARDER)
    assert share.sum() == pytest.approx(1)
    factor = np.ones(len(classes))
    for name, values in reader.HARDER.items():
        for value, more in values.items():
            factor[classes[:, captions.column(name)] == captions.class_of(name, value)] *= more
    assert share / share.min() == pytest.approx(factor / factor.min())


def test_what_is_learned_last_is_drawn_oftener(examples: train_dit.Examples) -> None:
    """Six clips, drawn 20,000 times: each as often as its factors say, five standard errors at most beside it."""
    classes = [dict(zip(captions.ATTRIBUTE_SIZES, row, strict=True)) for row in examples.classes.tolist()]
    share = np.ones(len(classes))
    for i, row in enumerate(classes):
        for name, factors in train_dit.OFTENER.items():
            for value, factor in factors.items():
                share[i] *= factor if row[name] == captions.class_of(name, value) else 1.0
    share /= share.sum()
    assert share.max() > 1.5 * share.min()
    drawn = examples.next(20_000)["index"].numpy()
    found = np.bincount(drawn, minlength=len(classes)) / len(drawn)
    assert np.abs(found - share).max() < 5 * (0.25 / len(drawn)) ** 0.5


def test_only_weights_that_are_no_longer_or_not_yet_there_may_differ() -> None:
    saved = {"0.weight": torch.zeros(8, 6), "0.bias": torch.zeros(8)}
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 2))
    fresh = model[1].weight.clone()
    optim.load(model, saved | {"1.scale": torch.ones(1)}, new="1.")
    assert not model[0].weight.any()
    assert torch.equal(model[1].weight, fresh)
    with pytest.raises(RuntimeError, match=r"1\.weight"):
        optim.load(model, saved, new="2.")


class Words:
    """A tokenizer of whole words."""

    def __init__(self) -> None:
        self.known: dict[str, int] = {}

    def encode(self, text: str) -> list[int]:
        return [
            self.known.setdefault(word, 2 + len(self.known)) for word in text.replace(",", "").split()
        ] + [1]


@pytest.mark.parametrize(
    ("text", "near", "far"),
    [
        ("a red ball above a green star on a dark green background", "red ball", "green star"),
        ("dark green background, a green star below a red ball", "red ball", "green star"),
        ("a green box right of a red ring, the green box falls", "red ring", "green box"),
    ],
)
def test_sides_are_of_the_first_words_for_each_object(text: str, near: str, far: str) -> None:
    tokenizer = Words()
    row = dict.fromkeys(captions.ATTRIBUTE_SIZES, captions.NO_CLASS)
    row |= {"near color": captions.class_of("color", "red"), "far color": captions.class_of("color", "green")}
    sides = train_text.Sides(tokenizer).of(tokenizer.encode(text), list(row.values()))  # type: ignore[arg-type]
    words = text.replace(",", "").split()
    for side, wanted in ((train_text.NEAR, near), (train_text.FAR, far)):
        assert [word for word, s in zip(words, sides, strict=False) if s == side] == wanted.split()


def test_a_text_encoder_learns_the_order_of_words(tmp_path: Path) -> None:
    """Which of two objects is the upper or left one takes the order. Queries move less than other matrices: at the rate
    of those, attention becomes a choice of one token, and the order is never learned."""
    data.make_shard(tmp_path / "clips" / "0000", 1, level="full", n=40, frames=5, size=(16, 16))
    torch.manual_seed(0)
    told = train_text.Captions(tmp_path, Words())  # type: ignore[arg-type]
    assert {train_text.NEAR, train_text.FAR} < set(told.sides.unique().tolist())
    model = train_dit.Starter()
    muon, _ = train_dit.optimisers_of(model, 0.02)
    rates = {id(p): group["lr"] for group in muon.param_groups for p in group["params"]}
    for layer in model.text.enc.blk:
        assert rates[id(layer.attn_q.weight)] == 0.02 / 8
        assert rates[id(layer.attn_k.weight)] == 0.02
    transformer = {name: weight.clone() for name, weight in model.dit.state_dict().items()}
    options = argparse.Namespace(minutes=60.0, steps=60, batch=48, lr=0.02)
    assert train_text.train(model, told, options, copy.deepcopy(model.text)) < 0.2
    assert all(torch.equal(weight, transformer[name]) for name, weight in model.dit.state_dict().items())
