"""Tokenizer ids against transformers and sentencepiece, and text cleaning against diffusers.

Three references, live:
- the converter of transformers (T5Converter) that made google/umt5-xxl's tokenizer.json, used to train Wan,
- `transformers.T5Tokenizer`, today's class, for its own layout of special ids (<unk> 2),
- sentencepiece itself, for text that names no special piece.
The vocabulary is trained here; the texts are what goes wrong elsewhere: full-width punctuation, ligatures,
emoji, unknown scripts.
"""

from __future__ import annotations

import io
import random
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import sentencepiece as spm
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from tokenizers.normalizers import Precompiled
from transformers import T5Tokenizer
from transformers.convert_slow_tokenizer import T5Converter

from mutoscope.engine.tokenizer import KEY, Tokenizer, clean_text
from training.make_tokenizer import metadata_from_sentencepiece

NEGATIVE = "色调艳丽，过曝，静态，细节模糊不清，字幕，倒着走"
CORPUS = [
    "a red ball falls and bounces on a gray background",
    "two cats, sharply dressed, box on a brightly lit stage; the crowd (in gold) cheers!",
    "the ball bounced; balls are bouncing: bounce, bounced, bounces.",
    "色调艳丽,过曝,静态,细节模糊不清,字幕,倒着走",
    "红色的球掉下来,两只猫在台上打拳。",
    "ein grüner Würfel dreht sich langsam, naïve café, 3/4 of 100%",
] * 8

TEXTS = [
    "",
    " ",
    "a red ball",
    "A Red BALL",
    "  two   spaces\tand\n lines  ",
    NEGATIVE,
    "色调艳丽, 过曝",
    "１２３ ｂａｌｌ ﬁne ½ Ⅷ ㎏ ℃",
    "cafe\u0301 café naïve",
    "zero\u200bwidth \ufeffmark no\u00a0break ideographic\u3000space",
    "ball \U0001f642 and \U0001f469\u200d\U0001f680 bounce",
    "日本語テキスト 한국어 العربية ไทย",
    "under▁score ▁ ▁▁lead",
    "</s> in the middle <pad> <unk> <s>",
    "[PAD300] [PAD301]",
    "<0xE4><0x41>",
    "x" * 300,
    "ball, " * 400,
]


@cache
def sentencepiece_model(unk_id: int = 3, *, byte_fallback: bool = False) -> bytes:
    """A unigram model with UMT5's special ids (<unk> 3) or T5's (<unk> 2)."""
    model = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        model_type="unigram",
        vocab_size=600 if byte_fallback else 300,
        hard_vocab_limit=False,
        normalization_rule_name="nmt_nfkc",
        byte_fallback=byte_fallback,
        pad_id=0,
        eos_id=1,
        bos_id=2 if unk_id == 3 else -1,
        unk_id=unk_id,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def ours(model: bytes, *, without: str = "", **changes: Any) -> Tokenizer:
    """Our tokenizer of a sentencepiece model, padded by 50 entries, with keys changed or taken away."""
    n_pieces = spm.SentencePieceProcessor(model_proto=model).get_piece_size()
    metadata = metadata_from_sentencepiece(model, vocab_size=n_pieces + 50)
    metadata |= {KEY + name: value for name, value in changes.items()}
    return Tokenizer.from_metadata({key: value for key, value in metadata.items() if key != KEY + without})


def converted(model: bytes) -> Any:
    """The backend that transformers' T5Converter builds, from sentencepiece's own reading of the model.

    The converter wants a parsed protobuf; what it reads of one is given to it directly.
    """
    processor = spm.SentencePieceProcessor(model_proto=model)
    n_pieces = processor.get_piece_size()

    def kind(i: int) -> int:
        if processor.is_unknown(i):
            return 2
        return 3 if processor.is_control(i) else 6 if processor.is_byte(i) else 1

    pieces = [
        SimpleNamespace(piece=processor.id_to_piece(i), score=processor.get_score(i), type=kind(i))
        for i in range(n_pieces)
    ]
    converter = object.__new__(T5Converter)
    converter.original_tokenizer = SimpleNamespace(
        _extra_ids=0, legacy=True, convert_tokens_to_ids=processor.piece_to_id
    )
    converter.proto = SimpleNamespace(
        pieces=pieces,
        trainer_spec=SimpleNamespace(model_type=1, unk_id=processor.unk_id()),
        normalizer_spec=SimpleNamespace(precompiled_charsmap=charsmap(model)),
    )
    backend = converter.converted()
    backend.add_special_tokens(["<pad>", "</s>", processor.id_to_piece(processor.unk_id())])
    return backend


def charsmap(model: bytes) -> bytes:
    """The normalisation table of a model."""
    return bytes(metadata_from_sentencepiece(model)[KEY + "precompiled_charsmap"])


def mixed_texts(count: int) -> list[str]:
    """Random text of known and unknown scripts, punctuation of both widths, spaces and combining marks."""
    rng = random.Random(0)
    alphabet = [
        *"abcdefgllnorstu   ,.!?",
        *"，。！？（）；：",
        *"红色的球猫",
        *"ｂａｌｌ",
        "ﬁ",
        "é",
        "e\u0301",
        "½",
    ]
    alphabet += [
        "\u200b",
        "\u3000",
        "\t",
        "\n",
        "\U0001f642",
        "▁",
        "カ\u3099",
        "ß",
        "ball",
        "bounc",
        "한",
        "\u0e33",
    ]
    return ["".join(rng.choices(alphabet, k=rng.randint(1, 40))) for _ in range(count)]


@pytest.mark.parametrize("byte_fallback", [False, True])
def test_ids_equal_the_converted_fast_tokenizer(byte_fallback: bool) -> None:
    model = sentencepiece_model(byte_fallback=byte_fallback)
    tokenizer, reference = ours(model), converted(model)
    for text in TEXTS + mixed_texts(1000):
        assert tokenizer.encode(text, max_length=10_000) == reference.encode(text).ids, repr(text)


def test_ids_equal_todays_t5_tokenizer() -> None:
    model = sentencepiece_model(unk_id=2)
    metadata = metadata_from_sentencepiece(model)
    reference = T5Tokenizer(
        vocab=list(zip(metadata[KEY + "tokens"], metadata[KEY + "scores"].tolist(), strict=True)),
        _spm_precompiled_charsmap=charsmap(model),
        extra_ids=0,
    )
    tokenizer = ours(model)
    for text in TEXTS + mixed_texts(1000):
        assert tokenizer.encode(text, max_length=10_000) == reference(text).input_ids, repr(text)
        for max_length in (1, 2, 7):
            expected = reference(text, truncation=True, max_length=max_length).input_ids
            assert tokenizer.encode(text, max_length=max_length) == expected, repr(text)


def test_ids_equal_sentencepiece() -> None:
    model = sentencepiece_model()
    tokenizer, reference = ours(model), spm.SentencePieceProcessor(model_proto=model)
    for text in TEXTS:
        if "</s>" not in text:
            assert tokenizer.encode(text, max_length=10_000) == [*reference.encode(text), 1], repr(text)


def test_the_charsmap_is_read_whole() -> None:
    """Our reading of the protobuf, against the normaliser of sentencepiece."""
    model = sentencepiece_model()
    reference = spm.SentencePieceNormalizer(model_proto=model)
    table = Precompiled(charsmap(model))
    for text in ("１２３ ｂａｌｌ", "ﬁne", "Ⅷ", "，。（）"):
        assert table.normalize_str(text).replace(" ", "▁") == reference.normalize(text).lstrip("▁")


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        ({"without": "precompiled_charsmap"}, NEGATIVE),
        ({"add_space_prefix": False}, "a red ball"),
        ({"remove_extra_whitespaces": False}, "two   spaces "),
        ({"eos_token_id": 2}, "a red ball"),
    ],
    ids=["no charsmap", "no space in front", "spaces kept", "wrong end"],
)
def test_a_tokenizer_built_wrongly_would_be_noticed(fault: dict[str, Any], text: str) -> None:
    model = sentencepiece_model()
    assert ours(model).encode(text) == converted(model).encode(text).ids
    assert ours(model, **fault).encode(text) != converted(model).encode(text).ids


@pytest.mark.parametrize(
    "text",
    [
        "",
        "  a  red\n ball ",
        "caf\u00c3\u00a9 &amp;amp; it&#39;s \u201cquoted\u201d",
        "&lt;b&gt; &nbsp; x",
        "ｆｕｌｌ　ｗｉｄｔｈ，ｄｏｎｅ。",
        "no\u00a0break\u2003em \x1b[31mred\x1b[0m",
        "CASE Stays",
        NEGATIVE,
    ],
)
def test_text_is_cleaned_as_in_the_official_pipeline(text: str) -> None:
    assert clean_text(text) == prompt_clean(text)
