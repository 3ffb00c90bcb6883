"""A small UMT5-style tokenizer for the starter model, trained with sentencepiece.

    python training/make_tokenizer.py captions.txt tokenizer.json --vocab-size 512

The result is the GGUF metadata that `Tokenizer.from_metadata` of the engine reads, in the layout of UMT5:
<pad> 0, </s> 1, <s> 2, <unk> 3, then pieces, then "[PAD{i}]" up to vocab_size.

Decisions:
- Every word of the captions is one piece. The words get the best score of the vocabulary; as all scores are
  negative, one piece then beats any two, whatever sentencepiece made of the word. Sub-pieces come from
  sentencepiece itself, and every printable ASCII character is a piece: an unseen word still says something.
- Case is folded inside the charsmap (nmt_nfkc_cf), because the captions are lower case and people write
  "A red ball". The engine applies the charsmap it is given and does not notice. `fold_case=False` gives
  nmt_nfkc, as UMT5 has it.
- No byte fallback: the fast tokenizer Wan was trained with never uses it (see the engine's tokenizer), and
  256 rows of a 512-row table would stand for bytes that no caption contains.
"""

from __future__ import annotations

import argparse
import io
import json
import re
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece as spm

from mutoscope.engine.tokenizer import KEY, TokenType

SPECIALS = {
    "<pad>": TokenType.CONTROL,
    "</s>": TokenType.CONTROL,
    "<s>": TokenType.CONTROL,
    "<unk>": TokenType.UNKNOWN,
}
"""The first pieces of UMT5, in id order."""

ASCII = "".join(chr(code) for code in range(0x21, 0x7F))
PADDING_SCORE = -10000.0

_SPACE = "▁"
_ID_FIELDS = {"unknown_token_id": 40, "eos_token_id": 42, "padding_token_id": 43}
"""Metadata key to field number in sentencepiece's TrainerSpec."""
_EDGES = re.compile(r"^\W+|\W+$")


def train_tokenizer(
    lines: Iterable[str], vocab_size: int = 512, *, words: Iterable[str] = (), fold_case: bool = True
) -> dict[str, Any]:
    """Train on caption lines and return GGUF metadata with exactly vocab_size tokens.

    words: further words that must be single pieces, besides all that occur in `lines`.
    Raises ValueError if the words and characters alone need more than vocab_size tokens.
    """
    text = [line.strip() for line in lines if line.strip()]
    whole = _words([*text, *words], fold_case=fold_case)
    trained = metadata_from_sentencepiece(_train(text + whole, vocab_size, fold_case=fold_case))
    scores = dict(zip(trained[KEY + "tokens"], trained[KEY + "scores"].tolist(), strict=True))
    scores = {piece: score for piece, score in scores.items() if piece not in SPECIALS}
    best = max(scores.values())
    chosen = {_SPACE + word: best for word in whole} | {p: s for p, s in scores.items() if len(p) == 1}
    room = vocab_size - len(SPECIALS) - len(chosen)
    if room < 0:
        raise ValueError(f"vocab_size {vocab_size}: {vocab_size - room} needed for words and characters")
    rest = sorted(scores.keys() - chosen.keys(), key=lambda piece: (-scores[piece], piece))
    chosen |= {piece: scores[piece] for piece in rest[:room]}
    return _metadata(
        [*SPECIALS, *chosen],
        [0.0] * len(SPECIALS) + list(chosen.values()),
        [*SPECIALS.values(), *[TokenType.NORMAL] * len(chosen)],
        charsmap=trained[KEY + "precompiled_charsmap"],
        settings={
            name: trained[KEY + name]
            for name in ("add_space_prefix", "remove_extra_whitespaces", *_ID_FIELDS)
        },
        vocab_size=vocab_size,
    )


def metadata_from_sentencepiece(model: bytes, vocab_size: int | None = None) -> dict[str, Any]:
    """The GGUF metadata of a sentencepiece model file, padded to vocab_size where given.

    Raises ValueError for a model that is not unigram.
    """
    pieces: list[str] = []
    scores: list[float] = []
    types: list[int] = []
    charsmap = b""
    flags = {"add_space_prefix": True, "remove_extra_whitespaces": True}
    ids = {"unknown_token_id": 0, "eos_token_id": 2, "padding_token_id": -1}  # sentencepiece's own defaults
    for field, value in _fields(model):
        if field == 1:  # ModelProto.pieces: piece = 1, score = 2, type = 3
            piece = dict(_fields(value))
            pieces.append(piece[1].decode())
            scores.append(struct.unpack("<f", piece.get(2, bytes(4)))[0])
            types.append(piece.get(3, TokenType.NORMAL))
        elif field == 2:  # ModelProto.trainer_spec
            spec = dict(_fields(value))
            if spec.get(3, 1) != 1:
                raise ValueError(f"sentencepiece model type {spec[3]} but 1 (unigram) expected")
            ids = {name: _signed(spec.get(number, ids[name])) for name, number in _ID_FIELDS.items()}
        elif field == 3:  # ModelProto.normalizer_spec
            spec = dict(_fields(value))
            charsmap = spec.get(2, b"")
            flags = {
                "add_space_prefix": bool(spec.get(3, 1)),
                "remove_extra_whitespaces": bool(spec.get(4, 1)),
            }
    return _metadata(
        pieces,
        scores,
        types,
        charsmap=np.frombuffer(charsmap, np.uint8),
        settings=flags | {name: value for name, value in ids.items() if value >= 0},
        vocab_size=vocab_size or len(pieces),
    )


def _metadata(
    tokens: list[str],
    scores: list[float],
    types: list[int],
    *,
    charsmap: np.ndarray,
    settings: dict[str, Any],
    vocab_size: int,
) -> dict[str, Any]:
    """The keys llama.cpp's T5 converter writes, padded to vocab_size; settings without their prefix."""
    n_pad = vocab_size - len(tokens)
    if n_pad < 0:
        raise ValueError(f"vocab_size {vocab_size} but the model has {len(tokens)} pieces")
    values = {
        "model": "t5",
        "pre": "default",
        "tokens": tokens + [f"[PAD{i}]" for i in range(len(tokens), vocab_size)],
        "scores": np.array(scores + [PADDING_SCORE] * n_pad, np.float32),
        "token_type": np.array(types + [TokenType.UNUSED] * n_pad, np.int32),
        **settings,
        "add_bos_token": False,
        "add_eos_token": True,
    }
    if len(charsmap):
        values["precompiled_charsmap"] = charsmap
    return {KEY + name: value for name, value in values.items()}


def _train(lines: list[str], vocab_size: int, *, fold_case: bool) -> bytes:
    """A sentencepiece unigram model with UMT5's special ids."""
    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="unigram",
        vocab_size=vocab_size,
        hard_vocab_limit=False,
        character_coverage=1.0,
        required_chars=ASCII.lower() if fold_case else ASCII,
        normalization_rule_name="nmt_nfkc_cf" if fold_case else "nmt_nfkc",
        byte_fallback=False,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        pad_piece="<pad>",
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def _words(lines: Iterable[str], *, fold_case: bool) -> list[str]:
    """Distinct words without punctuation at their ends, in alphabetical order."""
    found = {_EDGES.sub("", word) for line in lines for word in line.split()}
    return sorted({word.casefold() if fold_case else word for word in found} - {""})


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """(field number, value) of a protobuf message: int for varints, bytes for everything else."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = message[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(message):
        key = varint()
        number, wire = key >> 3, key & 7
        if wire == 0:
            yield number, varint()
            continue
        if wire not in (1, 2, 5):
            raise ValueError(f"not a sentencepiece model: wire type {wire} at byte {at}")
        size = varint() if wire == 2 else 8 if wire == 1 else 4
        yield number, message[at : at + size]
        at += size


def _signed(value: int) -> int:
    """A protobuf int32: negative numbers are stored as 64-bit two's complement."""
    return value - (1 << 64) if value >= 1 << 63 else value


def main() -> None:
    """Read caption lines, write the metadata as JSON."""
    parser = argparse.ArgumentParser(description="Train the starter model's tokenizer on caption lines.")
    parser.add_argument("captions", type=Path, help="text file, one caption per line")
    parser.add_argument("output", type=Path, help="JSON file to write")
    parser.add_argument("--vocab-size", type=int, default=512)
    parser.add_argument("--keep-case", action="store_true", help="nmt_nfkc as UMT5, without case folding")
    args = parser.parse_args()
    metadata = train_tokenizer(
        args.captions.read_text("utf-8").splitlines(), args.vocab_size, fold_case=not args.keep_case
    )
    plain = {
        key: value.tolist() if isinstance(value, np.ndarray) else value for key, value in metadata.items()
    }
    args.output.write_text(json.dumps(plain, ensure_ascii=False), "utf-8")
    print(f"{args.output}: {len(plain[KEY + 'tokens'])} tokens")


if __name__ == "__main__":
    main()
