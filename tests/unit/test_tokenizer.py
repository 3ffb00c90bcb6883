"""The tokenizer's refusals and edges, its speed at full size, and the starter's own vocabulary."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import models, pre_tokenizers

from mutoscope.engine.tokenizer import KEY, Tokenizer, TokenType, clean_text
from mutoscope.errors import WeightError
from scripts.make_random_model import made_up_tokenizer
from training.make_tokenizer import metadata_from_sentencepiece, train_tokenizer

CAPTIONS = [
    "a red ball falls and bounces on a gray background",
    "a small blue square moves left, slowly.",
    "two objects: a pink star spins and a white ring grows",
]


def metadata(**changes: Any) -> dict[str, Any]:
    """A hand-made vocabulary; a change to None takes the key away."""
    pieces = [
        ("<pad>", 0),
        ("</s>", 0),
        ("<s>", 0),
        ("<unk>", 0),
        ("▁", -2),
        ("▁ball", -3),
        ("s", -4),
        (",", -5),
    ]
    values: dict[str, Any] = {
        "model": "t5",
        "tokens": [piece for piece, _ in pieces] + ["[PAD8]", "[PAD9]"],
        "scores": [score for _, score in pieces] + [-10000.0] * 2,
        "token_type": [3, 3, 3, 2, 1, 1, 1, 1, 5, 5],
        "add_space_prefix": True,
        "remove_extra_whitespaces": True,
        "eos_token_id": 1,
        "padding_token_id": 0,
        "unknown_token_id": 3,
    } | changes
    return {KEY + name: value for name, value in values.items() if value is not None}


@pytest.fixture(scope="module")
def starter() -> dict[str, Any]:
    """What the starter's recipe makes of a few captions."""
    return train_tokenizer(CAPTIONS * 10, vocab_size=300, words=["triangle", "up-left"])


def test_ids_and_pieces() -> None:
    tokenizer = Tokenizer.from_metadata(metadata())
    assert (tokenizer.vocab_size, tokenizer.pad_id, tokenizer.eos_id, tokenizer.unk_id) == (10, 0, 1, 3)
    assert tokenizer.encode("balls, ball") == [5, 6, 7, 5, 1]
    assert tokenizer.pieces("balls, ball") == ["▁ball", "s", ",", "▁ball"]
    assert tokenizer.encode("") == [1]
    assert tokenizer.encode("qqq s") == [4, 3, 4, 6, 1], "a run of unknown characters is one <unk>"


@pytest.mark.parametrize(
    ("max_length", "expected"), [(1, [1]), (2, [5, 1]), (4, [5, 5, 5, 1]), (5, [5] * 4 + [1])]
)
def test_truncation_keeps_the_end_token(max_length: int, expected: list[int]) -> None:
    assert Tokenizer.from_metadata(metadata()).encode("ball " * 4, max_length) == expected


def test_the_default_length_is_that_of_wan() -> None:
    ids = Tokenizer.from_metadata(metadata()).encode("ball " * 600)
    assert len(ids) == 512
    assert ids[-1] == 1


def test_no_room_for_the_end_token_is_refused() -> None:
    with pytest.raises(ValueError, match="max_length 0"):
        Tokenizer.from_metadata(metadata()).encode("ball", 0)


def test_numpy_arrays_and_lists_mean_the_same() -> None:
    values = metadata()
    arrays = values | {
        KEY + "scores": np.array(values[KEY + "scores"], np.float32),
        KEY + "token_type": np.array(values[KEY + "token_type"], np.int32),
        KEY + "eos_token_id": np.uint32(1),
        KEY + "add_space_prefix": np.bool_(True),
    }
    text = "balls, ball q"
    assert Tokenizer.from_metadata(arrays).encode(text) == Tokenizer.from_metadata(values).encode(text)


def test_the_type_decides_which_token_is_unknown() -> None:
    for value in (2, None):
        assert Tokenizer.from_metadata(metadata(unknown_token_id=value)).unk_id == 3
    types = [3, 3, 3, 3, 1, 1, 1, 1, 5, 5]
    assert Tokenizer.from_metadata(metadata(token_type=types)).unk_id == 3
    with pytest.raises(WeightError, match="0 tokens of type UNKNOWN"):
        Tokenizer.from_metadata(metadata(token_type=types, unknown_token_id=None))


def test_padding_is_out_of_reach() -> None:
    """Neither its name matches, nor does its score make unknown characters dearer.

    "abcde" is one unknown and a good piece for 40 + 10 + 1, or three poor pieces for 120; were padding to
    count, an unknown would cost 10010.
    """
    changes = {
        "tokens": ["<pad>", "</s>", "<s>", "<unk>", "▁", "ab", "cd", "e", "bcde", "[PAD9]"],
        "scores": [0, 0, 0, 0, -1, -40, -40, -40, -1, -10000],
        "token_type": [3, 3, 3, 2, 1, 1, 1, 1, 1, 5],
    }
    tokenizer = Tokenizer.from_metadata(metadata(**changes))
    assert tokenizer.encode("abcde") == [4, 3, 8, 1]
    assert 9 not in tokenizer.encode("[PAD9]")
    counted = metadata(**changes | {"token_type": [3, 3, 3, 2, 1, 1, 1, 1, 1, 1]})
    assert Tokenizer.from_metadata(counted).encode("abcde") == [4, 5, 6, 7, 1]


def test_an_unused_piece_among_the_others_keeps_its_id_and_is_never_produced() -> None:
    tokenizer = Tokenizer.from_metadata(metadata(token_type=[3, 3, 3, 2, 1, 5, 1, 1, 5, 5]))
    assert tokenizer.vocab_size == 10
    assert tokenizer.encode("balls,") == [4, 3, 6, 7, 1]


def test_special_pieces_are_matched_in_the_text() -> None:
    types = [3, 3, 3, 2, 1, 1, 1, 1, 4, 5]
    tokenizer = Tokenizer.from_metadata(metadata(token_type=types))
    assert tokenizer.encode("ball</s>ball [PAD8]") == [5, 1, 5, 8, 1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": None}, r"model: got None but 't5' expected"),
        ({"model": "llama"}, r"model: got 'llama' but 't5' expected"),
        ({"tokens": None}, r"tokens: missing or empty"),
        ({"tokens": []}, r"tokens: missing or empty"),
        ({"tokens": "abc"}, r"tokens: missing or empty"),
        ({"tokens": 5}, r"tokens: missing or empty"),
        ({"tokens": ["a", 7]}, r"tokens: entry 1 is int, text expected"),
        ({"scores": None}, r"scores: missing, 10 entries expected"),
        ({"scores": [0.0] * 9}, r"scores: shape \[9\] but \[10\] expected"),
        ({"scores": ["x"] * 10}, r"scores: numbers expected"),
        ({"scores": [0.0] * 4 + [float("nan")] + [0.0] * 5}, r"scores: entry 4 is not a finite number"),
        ({"token_type": None}, r"token_type: missing"),
        ({"token_type": [[1] * 10]}, r"token_type: shape \[1, 10\] but \[10\] expected"),
        ({"token_type": [5] * 10}, r"unknown_token_id: 3 is UNUSED"),
        ({"token_type": [2, 2] + [1] * 8, "unknown_token_id": None}, r"2 tokens of type UNKNOWN"),
        ({"token_type": [1] * 10, "unknown_token_id": 10}, r"unknown_token_id: got 10 but an id from 0 to 9"),
        ({"token_type": [1] * 8 + [5] * 2, "unknown_token_id": 9}, r"unknown_token_id: 9 is UNUSED"),
        ({"eos_token_id": 10}, r"eos_token_id: got 10 but an id from 0 to 9 expected"),
        ({"eos_token_id": -1}, r"eos_token_id: got -1"),
        ({"eos_token_id": "1"}, r"eos_token_id: got '1'"),
        ({"padding_token_id": True}, r"padding_token_id: got True"),
        ({"add_space_prefix": "yes"}, r"add_space_prefix: got 'yes' but true or false expected"),
        ({"precompiled_charsmap": [1, 2]}, r"precompiled_charsmap: 2 bytes announce"),
        ({"precompiled_charsmap": [0, 1, 0, 0] + [0] * 9}, r"charsmap: 13 bytes announce a trie of 256"),
        ({"precompiled_charsmap": [300] * 8}, r"precompiled_charsmap: got int64 values but bytes expected"),
        ({"precompiled_charsmap": ["a"] * 8}, r"precompiled_charsmap: got .* values but bytes expected"),
        ({"precompiled_charsmap": 7}, r"precompiled_charsmap: got .* values but bytes expected"),
        ({"precompiled_charsmap": bytes([4, 0, 0, 0]) + b"\xff" * 9}, r"precompiled_charsmap is damaged"),
    ],
)  # fmt: skip
def test_malformed_metadata_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(WeightError, match=message):
        Tokenizer.from_metadata(metadata(**changes))


def test_a_damaged_charsmap_is_an_error_not_a_crash(
    starter: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    """Random damage either goes unnoticed or is a WeightError; some of it has to be noticed."""
    good = np.asarray(starter[KEY + "precompiled_charsmap"])
    rng = np.random.default_rng(0)
    noticed = 0
    for _ in range(150):
        bad = good.copy()
        at = rng.integers(0, 4096, size=64)
        bad[at] = rng.integers(0, 256, size=64)
        try:
            Tokenizer.from_metadata(starter | {KEY + "precompiled_charsmap": bad}).encode(
                "Ａ red ball， ﬁne 色调"
            )
        except WeightError as error:
            assert "precompiled_charsmap" in error.message  # noqa: PT017 - not every damage raises
            noticed += 1
    capfd.readouterr()  # the messages of the Rust side
    assert noticed > 0


def test_a_full_size_vocabulary_loads_fast_and_cuts_as_one_model_of_it_would() -> None:
    """256,384 tokens as in UMT5. Measured 0.1 s of one core, a model of all pieces 0.3 to 0.6; alarm 3 s."""
    n_pieces, n_tokens = 256_300, 256_384
    values = made_up_tokenizer(n_tokens)
    tokens, scores = values[KEY + "tokens"], values[KEY + "scores"]
    types = np.array(values[KEY + "token_type"])
    types[n_pieces:] = TokenType.UNUSED
    scores[n_pieces:] = -10000
    began = time.perf_counter()
    tokenizer = Tokenizer.from_metadata(values | {KEY + "token_type": types})
    ids = [tokenizer.encode(text) for text in CAPTIONS]
    took_s = time.perf_counter() - began
    assert tokenizer.vocab_size == n_tokens
    assert took_s < 3

    whole = HFTokenizer(models.Unigram(list(zip(tokens, scores.tolist(), strict=True))[:n_pieces], 3))
    whole.pre_tokenizer = pre_tokenizers.Metaspace()
    rng = random.Random(0)
    texts = ["".join(rng.choices("abcdeeilnorstu   色，조", k=40)).strip() for _ in range(50)]
    texts = [" ".join(text.split()) for text in texts]
    assert ids == [[*whole.encode(text).ids, 1] for text in CAPTIONS]
    assert [tokenizer.encode(text) for text in texts] == [[*whole.encode(text).ids, 1] for text in texts]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("  a  red\n\tball ", "a red ball"),
        ("caf\u00c3\u00a9", "café"),
        ("a &amp;amp; b", "a & b"),
        ("Red BALL", "Red BALL"),
        ("", ""),
    ],
)
def test_clean_text(text: str, expected: str) -> None:
    assert clean_text(text) == expected


def test_every_word_of_the_captions_is_one_piece(starter: dict[str, Any]) -> None:
    tokenizer = Tokenizer.from_metadata(starter)
    words = {word.strip(",.:") for line in CAPTIONS for word in line.split()} | {"triangle", "up-left"}
    for word in words:
        assert tokenizer.pieces(word) == ["▁" + word]
    assert tokenizer.pieces("square, ball.") == ["▁square", ",", "▁ball", "."]


def test_unseen_words_are_spelled(starter: dict[str, Any]) -> None:
    tokenizer = Tokenizer.from_metadata(starter)
    for word in ("balloons", "zebra", "x-ray", "42%", "Jazz"):
        pieces = tokenizer.pieces(word)
        assert "".join(pieces) == "▁" + word.lower()
        assert len(pieces) > 1
        assert tokenizer.unk_id not in tokenizer.encode(word)


def test_the_starter_reads_capitals_and_full_width_text(starter: dict[str, Any]) -> None:
    tokenizer = Tokenizer.from_metadata(starter)
    assert (
        tokenizer.encode("A Red BALL")
        == tokenizer.encode("a red ball")
        == tokenizer.encode("ａ ｒｅｄ ｂａｌｌ")
    )


def test_the_starter_can_keep_case() -> None:
    tokenizer = Tokenizer.from_metadata(train_tokenizer(["A Red ball"] * 5, vocab_size=150, fold_case=False))
    assert tokenizer.pieces("A Red ball") == ["▁A", "▁Red", "▁ball"]
    assert tokenizer.pieces("a")[0] == "▁"


def test_the_starter_has_the_layout_of_umt5(starter: dict[str, Any]) -> None:
    assert starter[KEY + "tokens"][:4] == ["<pad>", "</s>", "<s>", "<unk>"]
    assert len(starter[KEY + "tokens"]) == len(set(starter[KEY + "tokens"])) == 300
    assert starter[KEY + "tokens"][-1] == "[PAD299]"
    tokenizer = Tokenizer.from_metadata(starter)
    assert (tokenizer.pad_id, tokenizer.eos_id, tokenizer.unk_id) == (0, 1, 3)


def test_training_twice_gives_the_same(starter: dict[str, Any]) -> None:
    again = train_tokenizer(CAPTIONS * 10, vocab_size=300, words=["triangle", "up-left"])
    assert again.keys() == starter.keys()
    assert all(np.array_equal(again[key], starter[key]) for key in starter)


def test_a_vocabulary_too_small_for_the_words_is_refused() -> None:
    with pytest.raises(ValueError, match=r"vocab_size 100: .* needed"):
        train_tokenizer([f"{a}{b}" for a in "abcdefgh" for b in "abcdefgh"], vocab_size=100)


def test_a_file_that_is_no_unigram_model_is_refused() -> None:
    with pytest.raises(ValueError, match=r"type 2 but 1 \(unigram\) expected"):
        metadata_from_sentencepiece(bytes([0x12, 0x02, 0x18, 0x02]))
    with pytest.raises(ValueError, match="not a sentencepiece model"):
        metadata_from_sentencepiece(b"GGUF" + bytes(20))


def test_the_command_writes_what_the_tokenizer_reads(tmp_path: Path) -> None:
    captions, output = tmp_path / "captions.txt", tmp_path / "tokenizer.json"
    captions.write_text("\n".join(CAPTIONS), "utf-8")
    command = [
        sys.executable,
        "-m",
        "training.make_tokenizer",
        str(captions),
        str(output),
        "--vocab-size",
        "200",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "200 tokens" in done.stdout
    tokenizer = Tokenizer.from_metadata(json.loads(output.read_text("utf-8")))
    assert tokenizer.pieces("a red ball") == ["▁a", "▁red", "▁ball"]
