"""UMT5 tokenizer, rebuilt from the metadata of a GGUF file.

A sentencepiece unigram vocabulary travels in the keys `tokenizer.ggml.*` that llama.cpp's T5 converter
writes. From them we assemble the same normaliser, pre-tokenizer and model that `transformers` assembles
from the sentencepiece file, so that ids equal the ones Wan was trained with (Wan2.1 9737cba,
`wan/modules/tokenizers.py`, uses the fast HF tokenizer of google/umt5-xxl).

Details that have caused bugs, here or elsewhere:
- Without the precompiled charsmap there is no NFKC: the full-width punctuation of the Chinese negative prompt
  turns into other ids.
- The vocabulary is padded with "[PAD0]", "[PAD1]" ... of score -10000. An unknown character costs 10 more
  than the worst piece, so padding must not reach the model: it would make unknowns cost 10010.
- `unknown_token_id` is missing or wrong in some files; the one token of type UNKNOWN decides.
- UMT5 has byte pieces, but the fast HF tokenizer, hence Wan's training, never falls back to them: a run of
  unknown characters becomes one <unk>.

A model of all 256k pieces takes a second to make and 0.6 GB of memory, for one sentence. Which path through a text is
best depends on the pieces that occur in it and on the lowest score of all, so every text gets a model of just these.
"""

from __future__ import annotations

import html
import re
from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import Any

import ftfy
import numpy as np
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as HFTokenizer

from mutoscope.errors import WeightError

KEY = "tokenizer.ggml."
MAX_LENGTH = 512
"""Tokens of text the Wan models read, </s> included."""

_METASPACE = "▁"


class TokenType(IntEnum):
    """Meaning of `tokenizer.ggml.token_type`, the numbers of sentencepiece."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


def clean_text(text: str) -> str:
    """Tidy a prompt as the official code does: mojibake, HTML entities (twice), white space. Keeps case."""
    text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    return re.sub(r"\s+", " ", text).strip()


class Tokenizer:
    """Text to UMT5 ids. Immutable once built.

    vocab_size counts the padding entries too: it is the number of rows of the embedding table.
    """

    def __init__(
        self,
        vocabulary: _Vocabulary,
        normalizer: Any,
        pre_tokenizer: Any,
        *,
        vocab_size: int,
        pad_id: int,
        eos_id: int,
    ) -> None:
        self._vocabulary = vocabulary
        self._normalizer = normalizer
        self._pre_tokenizer = pre_tokenizer
        self._without_pieces = self._backend([])
        self.vocab_size = vocab_size
        self.pad_id = pad_id
        self.eos_id = eos_id
        self.unk_id = vocabulary.unk_id

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, Any]) -> Tokenizer:
        """Build from GGUF metadata; arrays may be lists or numpy arrays.

        Raises WeightError when a key is missing or the entries contradict each other.
        """
        kind = metadata.get(KEY + "model")
        if kind != "t5":
            raise WeightError(
                f"{KEY}model: got {kind!r} but 't5' expected (a sentencepiece unigram vocabulary).",
                hint="Use a UMT5 GGUF file that carries its tokenizer.",
            )
        tokens = _tokens(metadata)
        scores = _numbers(metadata, "scores", np.float64, len(tokens))
        types = _numbers(metadata, "token_type", np.int64, len(tokens))
        if not np.isfinite(scores).all():
            raise WeightError(f"{KEY}scores: entry {np.argmin(np.isfinite(scores))} is not a finite number.")
        unk_id = _unknown_id(metadata, types)
        collapse = _flag(metadata, "remove_extra_whitespaces")
        return cls(
            _Vocabulary(tokens, scores, types, unk_id),
            normalizers.Sequence(_normalizers(metadata, collapse=collapse)),
            pre_tokenizers.Metaspace(
                replacement=_METASPACE,
                prepend_scheme="always" if _flag(metadata, "add_space_prefix") else "never",
            ),
            vocab_size=len(tokens),
            pad_id=_id(metadata, "padding_token_id", 0, len(tokens)),
            eos_id=_id(metadata, "eos_token_id", 1, len(tokens)),
        )

    def encode(self, text: str, max_length: int = MAX_LENGTH) -> list[int]:
        """Ids of `text`, at most max_length, the last one always </s>. Neither padded nor cleaned."""
        if max_length < 1:
            raise ValueError(f"max_length {max_length}: at least 1 expected, the place of </s>")
        own, ids = self._encoding(text)
        return [*(ids[i] for i in own.ids[: max_length - 1]), self.eos_id]

    def pieces(self, text: str) -> list[str]:
        """How `text` is cut, in words a person can read; without </s> and not truncated."""
        return list(self._encoding(text)[0].tokens)

    def _encoding(self, text: str) -> tuple[Any, list[int]]:
        """The text cut by a model of its own, and the ids of that model's pieces."""
        try:
            # Without pieces all is unknown, and an unknown run is shown as it stands after normalisation.
            words = "".join(self._without_pieces.encode(text, add_special_tokens=False).tokens)
            ids = self._vocabulary.occurring(words)
            own = self._backend(ids).encode(text, add_special_tokens=False)
        except BaseException as error:
            # The Rust side walks the charsmap without bounds checks of its own and panics on a damaged one.
            if type(error).__name__ != "PanicException":
                raise
            raise WeightError(f"{KEY}precompiled_charsmap is damaged: {error}") from error
        return own, self._vocabulary.always + ids

    def _backend(self, ids: list[int]) -> HFTokenizer:
        """A tokenizer of the pieces that are always there and of these."""
        model, added = self._vocabulary.model(ids)
        backend = HFTokenizer(model)
        backend.normalizer = self._normalizer
        backend.pre_tokenizer = self._pre_tokenizer
        backend.add_tokens(added)
        return backend


class _Vocabulary:
    """All pieces, with padding out of reach: an UNUSED piece is never found, and its score counts for nothing.

    always: ids that every model has: special pieces, which are matched in the raw text before anything else (<pad>,
    </s>, <extra_id_0> ...), and the piece of the lowest score, to which the price of unknown characters is tied.
    """

    def __init__(self, tokens: list[str], scores: np.ndarray, types: np.ndarray, unk_id: int) -> None:
        self.tokens = tokens
        self.scores = scores
        self.unk_id = unk_id
        whole = np.isin(types, (TokenType.CONTROL, TokenType.UNKNOWN, TokenType.USER_DEFINED))
        (used,) = np.nonzero(types != TokenType.UNUSED)
        special = np.nonzero(whole)[0].tolist()
        self._added = [
            AddedToken(tokens[i], normalized=False, special=bool(types[i] != TokenType.USER_DEFINED))
            for i in special
        ]
        lowest = int(used[np.argmin(scores[used])])
        self.always = list(dict.fromkeys([*special, unk_id, lowest]))
        there = {tokens[i] for i in self.always}
        self._id_of = {tokens[i]: i for i in used.tolist() if tokens[i] not in there}
        self._longest = max(map(len, self._id_of), default=0)

    def occurring(self, words: str) -> list[int]:
        """Ids of the pieces that occur in a normalised text. No piece goes beyond a word, which begins with a mark."""
        found: dict[int, None] = {}
        for word in dict.fromkeys(re.findall(f"{_METASPACE}[^{_METASPACE}]*|[^{_METASPACE}]+", words)):
            for start in range(len(word)):
                for stop in range(start + 1, min(start + self._longest, len(word)) + 1):
                    i = self._id_of.get(word[start:stop])
                    if i is not None:
                        found[i] = None
        return list(found)

    def model(self, ids: list[int]) -> tuple[models.Unigram, list[AddedToken]]:
        """A unigram model of `always` and these, in this order, and the pieces to match before it."""
        ids = self.always + ids
        pieces = [(self.tokens[i], float(self.scores[i])) for i in ids]
        return models.Unigram(pieces, ids.index(self.unk_id), byte_fallback=False), self._added


def _tokens(metadata: Mapping[str, Any]) -> list[str]:
    """The pieces in id order."""
    raw = metadata.get(KEY + "tokens")
    if not isinstance(raw, (Sequence, np.ndarray)) or isinstance(raw, str) or not len(raw):
        raise WeightError(f"{KEY}tokens: missing or empty, a list of pieces expected.")
    tokens = list(raw)  # also turns a lazy sequence into text, once
    odd = next((i for i, token in enumerate(tokens) if not isinstance(token, str)), None)
    if odd is not None:
        raise WeightError(f"{KEY}tokens: entry {odd} is {type(tokens[odd]).__name__}, text expected.")
    return tokens


def _numbers(metadata: Mapping[str, Any], name: str, dtype: type[np.generic], count: int) -> np.ndarray:
    """The array `name` with one number per token."""
    raw = metadata.get(KEY + name)
    if raw is None:
        raise WeightError(f"{KEY}{name}: missing, {count} entries expected, one per token.")
    try:
        values = np.asarray(raw, dtype=dtype)
    except (TypeError, ValueError, OverflowError) as error:
        raise WeightError(f"{KEY}{name}: numbers expected ({error}).") from error
    if values.shape != (count,):
        raise WeightError(f"{KEY}{name}: shape {list(values.shape)} but {[count]} expected, one per token.")
    return values


def _flag(metadata: Mapping[str, Any], name: str) -> bool:
    """A yes/no key; both that we read are true in T5 vocabularies and when absent."""
    value = metadata.get(KEY + name, True)
    if not isinstance(value, (bool, np.bool_)):
        raise WeightError(f"{KEY}{name}: got {value!r} but true or false expected.")
    return bool(value)


def _id(metadata: Mapping[str, Any], name: str, default: int, count: int) -> int:
    """A token id within the vocabulary."""
    value = metadata.get(KEY + name, default)
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not 0 <= value < count:
        raise WeightError(f"{KEY}{name}: got {value!r} but an id from 0 to {count - 1} expected.")
    return int(value)


def _unknown_id(metadata: Mapping[str, Any], types: np.ndarray) -> int:
    """The token of type UNKNOWN; the metadata key only where the types name none or several."""
    (marked,) = np.nonzero(types == TokenType.UNKNOWN)
    if len(marked) == 1:
        return int(marked[0])
    if KEY + "unknown_token_id" not in metadata:
        raise WeightError(
            f"{KEY}token_type: {len(marked)} tokens of type UNKNOWN but one expected, "
            f"and {KEY}unknown_token_id is missing."
        )
    unk_id = _id(metadata, "unknown_token_id", 0, len(types))
    if types[unk_id] == TokenType.UNUSED:
        raise WeightError(f"{KEY}unknown_token_id: {unk_id} is UNUSED, a piece of the vocabulary expected.")
    return unk_id


def _normalizers(metadata: Mapping[str, Any], *, collapse: bool) -> list[Any]:
    """The charsmap (NFKC and more, as trained) and, if asked for, single spaces with none at the ends."""
    steps: list[Any] = []
    charsmap = metadata.get(KEY + "precompiled_charsmap")
    if charsmap is not None and np.size(charsmap):
        steps.append(_charsmap(charsmap))
    if collapse:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(r"\s+"), " ")]
    return steps


def _charsmap(raw: Any) -> Any:
    """The normaliser of a charsmap: uint32 length of the trie, its uint32 units, the texts they name."""
    name = KEY + "precompiled_charsmap"
    values = np.frombuffer(raw, np.uint8) if isinstance(raw, bytes) else np.asarray(raw)
    if values.ndim != 1 or values.dtype.kind not in "iu" or values.min() < -128 or values.max() > 255:
        raise WeightError(f"{name}: got {values.dtype} values but bytes expected.")
    data = (values & 0xFF).astype(np.uint8).tobytes()  # some writers store bytes as int8
    trie_bytes = int.from_bytes(data[:4], "little")
    if trie_bytes % 4 or not 0 < trie_bytes <= len(data) - 4:
        raise WeightError(f"{name}: {len(data)} bytes announce a trie of {trie_bytes}; damaged or cut.")
    try:
        return normalizers.Precompiled(data)
    except Exception as error:  # the bindings raise nothing more precise
        raise WeightError(f"{name} is damaged: {error}") from error
