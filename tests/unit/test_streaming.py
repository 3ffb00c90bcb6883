"""Weights that travel: in order, never overwritten in use, and the numbers are those of weights that stay."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mutoscope.engine import streaming
from mutoscope.engine.gguf import GGMLType
from mutoscope.engine.linear import Packed, QuantLinear, Unpacked
from mutoscope.engine.streaming import Block, BlockStream, InOrder, place_of, stream_blocks
from mutoscope.engine.wan import TextContext, WanModel, rope_table
from mutoscope.engine.weights import load_wan

CPU = torch.device("cpu")
N = 8


class Late(InOrder):
    """A device that copies as late as it may: when a product waits for it, or the slot is needed again.

    Notes what is asked for, and holds everybody to the rules.
    """

    def __init__(self) -> None:
        self.log: list[str] = []
        self.pending: dict[int, tuple[Tensor, Sequence[Tensor]]] = {}
        self.marks = 0
        self.read_until: dict[int, int] = {}
        """By slot: the mark after its last product; what is being read has none yet."""
        self.reading: int | None = None
        self.waited: dict[int, bool] = {}

    def copy(self, target: Tensor, parts: Sequence[Tensor], after: Any) -> Any:
        slot = target.data_ptr()
        assert slot != self.reading, "a slot was overwritten while it is read"
        assert after >= self.read_until.get(slot, 0), (
            "a copy does not wait for the products on what was there"
        )
        target.fill_(0xAA)
        self.pending.pop(slot, None)  # a wrong guess: its copy would have come first, in the same stream
        self.pending[slot] = (target, parts)
        self.waited[slot] = False
        self.log.append("copy")
        return slot

    def wait(self, mark: Any) -> None:
        if mark in self.pending:
            super().copy(*self.pending.pop(mark), None)
        self.waited[mark] = True
        self.log.append("wait")

    def mark(self) -> int:
        self.marks += 1
        if self.reading is not None:
            self.read_until[self.reading] = self.marks
            self.reading = None
        return self.marks

    def read(self, memory: Tensor) -> None:
        slot = memory.untyped_storage().data_ptr()
        if slot in self.waited:
            assert self.waited[slot], "a product does not wait for the copy of its weight"
            self.reading = slot


def layer(seed: int, n: int = 24) -> QuantLinear:
    values = torch.randn(n, 32, generator=torch.Generator().manual_seed(seed))
    packed = Packed(values.view(torch.uint8).flatten(), GGMLType.F32, (n, 32))
    return QuantLinear(packed, None, Unpacked(torch.float32), CPU)


def watched(n_blocks: int = N, room: int = 0) -> tuple[BlockStream, Late, list[list[QuantLinear]]]:
    """A stream of blocks of two layers, on a device that checks."""
    layers = [[layer(2 * i), layer(2 * i + 1, 8 + i)] for i in range(n_blocks)]
    lane = Late()
    stream = BlockStream([Block(pair) for pair in layers], CPU, lane)
    for one in (one for pair in layers for one in pair):
        fetch = one.fetch
        assert fetch is not None

        def told(fetch: Any = fetch) -> Tensor:
            memory: Tensor = fetch()
            lane.read(memory)
            return memory

        one.fetch = told
    stream.settle(room)
    return stream, lane, layers


def right(one: QuantLinear) -> bool:
    x = torch.ones(1, 32)
    return torch.equal(one(x), x @ one.packed.view(torch.float32).view(-1, 32).T)


# -- order ---------------------------------------------------------------------------------------------------


def test_a_block_travels_while_the_one_before_it_works() -> None:
    _, lane, layers = watched()
    for _ in range(3):
        for pair in layers:
            assert all(right(one) for one in pair)
    assert lane.log[:5] == ["copy", "wait", "copy", "wait", "copy"], (
        "the next is sent for after the wait for this"
    )
    assert lane.log.count("copy") == 3 * N + 1, "each once a round, and the first of the next"


def test_what_comes_next_is_learned() -> None:
    """In another order than given: at first it sends in vain, then no more."""
    _, lane, layers = watched()
    order = [0, 4, 1, 5, 2, 6, 3, 7]
    counts = []
    for _ in range(4):
        before = lane.log.count("copy")
        assert all(right(one) for i in order for one in layers[i])
        counts.append(lane.log.count("copy") - before)
    assert counts[0] > counts[2] == counts[3] == N


@pytest.mark.parametrize("seed", range(4))
def test_any_order_at_all_is_right(seed: int) -> None:
    """Steps that leave out blocks, and come back to the one before: guesses fail, numbers do not."""
    stream, _, layers = watched(room=0 if seed % 2 else 40_000)
    rng = torch.Generator().manual_seed(seed)
    for i in torch.randint(0, N, (120,), generator=rng).tolist():
        assert all(right(one) for one in layers[i])
        if i == 3:
            stream.settle(int(torch.randint(0, 60_000, (), generator=rng)))


def test_the_checks_notice_a_slot_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sending into the slot that is read, and not waiting: both would be seen."""
    stream, lane, layers = watched()
    assert right(layers[0][0])
    stream._last = None
    with pytest.raises(AssertionError, match="while it is read"):
        stream._send(stream.blocks[5])
    stream, lane, layers = watched()
    monkeypatch.setattr(lane, "wait", lambda mark: None)
    with pytest.raises(AssertionError, match="does not wait"):
        right(layers[0][0])
    stream, lane, layers = watched()
    monkeypatch.setattr(stream, "_leave", lane.mark)  # and the slot is not told
    with pytest.raises(AssertionError, match="wait for the products"):
        [right(pair[0]) for pair in layers[:3]]


# -- budget --------------------------------------------------------------------------------------------------


def test_as_many_stay_as_fit() -> None:
    stream, _, layers = watched()
    sizes = [block.nbytes for block in stream.blocks]
    assert stream.least_bytes == 2 * max(sizes)
    for room in (0, stream.least_bytes, 20_000, 30_000, stream.all_bytes - 1, stream.all_bytes):
        used = stream.settle(room)
        staying = sum(block.nbytes for block in stream.blocks if block.stays)
        assert used == staying + (stream.least_bytes if stream.travelling else 0)
        assert used <= max(room, stream.least_bytes)
        assert (not stream.travelling) == (room >= stream.all_bytes)
        assert all(right(one) for pair in layers for one in pair)
        held = sum(block.nbytes for block in stream.blocks if block.kept is not None)
        assert held + sum(slot.memory.nbytes for slot in stream._slots) <= used
        assert all((block.pinned is None) == block.stays for block in stream.blocks)


def test_those_that_travel_are_spread() -> None:
    """Side by side they would wait for each other."""
    stream, _, _ = watched(12)
    stream.settle(stream.all_bytes - stream.blocks[0].nbytes)
    gaps = [i for i, block in enumerate(stream.blocks) if not block.stays]
    assert 2 < len(gaps) < 7
    assert max(b - a for a, b in pairwise(gaps)) <= 12 // len(gaps) + 1


def test_pieces_of_pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "PIECE_BYTES", 1000)
    stream, _, layers = watched()
    assert all(right(one) for pair in layers for one in pair)
    pinned = stream.blocks[0].pinned
    assert pinned is not None
    assert [len(piece) for piece in pinned] == [1000, 1000, 1000, 1000, 96]


# -- a model -------------------------------------------------------------------------------------------------


def test_places() -> None:
    assert place_of("blocks.3.ffn.0") == place_of("vace_blocks.0.after_proj") == "travels"
    assert place_of("blocks.3.cross_attn.k") == place_of("enc.blk.0.attn_q") == "copied"
    assert place_of("time_projection.1") == place_of("text_embedding.0") == "copied"
    assert place_of("head.head") == place_of("vace_blocks.0.before_proj") == "stays"


def velocity(model: WanModel, *, vace: bool = True, n: int = 1) -> Tensor:
    rng = torch.Generator().manual_seed(1)
    c = model.config
    x = torch.randn(1, c.in_dim, 2, 4, 4, generator=rng)
    text = model.text_context(torch.randn(1, 5, c.text_dim, generator=rng), [5])
    side = model.vace_tokens(torch.randn(1, c.vace_in_dim, 2, 4, 4, generator=rng)) if vace else None
    time = model.time_modulation(torch.tensor([500.0]))
    text = TextContext([k.expand(n, -1, -1, -1) for k in text.keys], [v.expand(n, -1, -1, -1) for v in text.values],
                       None if text.bias_B11S is None else text.bias_B11S.expand(n, -1, -1, -1))  # fmt: skip
    side = None if side is None else side.expand(n, -1, -1)
    rope = rope_table((2, 2, 2), c.head_dim)
    return model(x.expand(n, -1, -1, -1, -1), time, text, rope, side).clone()


@torch.inference_mode()
def test_numbers_do_not_change(tiny_model: Path) -> None:
    model = load_wan(tiny_model / "dit.gguf")
    expected = {vace: velocity(model, vace=vace) for vace in (True, False)}
    stream = stream_blocks(model, CPU, lane := Late())
    for room in (0, stream.least_bytes + stream.blocks[0].nbytes, stream.all_bytes):
        stream.settle(room)
        for vace in (True, False, True):
            assert torch.equal(velocity(model, vace=vace), expected[vace])
    assert "copy" in lane.log


@torch.inference_mode()
def test_the_guided_and_the_unguided_pass_share_copies_and_unpacking(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_wan(tiny_model / "dit.gguf", compute_dtype=torch.bfloat16)
    stream_blocks(model, CPU, lane := Late()).settle(0)
    for _ in range(2):
        velocity(model)  # the order of blocks is learned
    values, made = Packed.values, []

    def counted(self: Packed, *args: Any) -> Tensor:
        made.append(self)
        return values(self, *args)

    monkeypatch.setattr(Packed, "values", counted)
    counts = []
    for n in (1, 2):
        made.clear()
        lane.log.clear()
        velocity(model, n=n)
        counts.append((len(made), lane.log.count("copy")))
    assert counts[0] == counts[1]
    assert counts[0][0] > 30
