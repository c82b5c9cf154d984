"""The bound is never above the number of tokens, and tight enough to refuse what cannot fit."""

import json
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tests.fakes.byte_tokenizer import byte_tokenizer
from tokenizers import models, normalizers, pre_tokenizers, trainers

from kagami_router.text.token_bound import TokenBound

CORPUS = [
    "The quick brown fox jumps over the lazy dog. " * 3,
    "Internationalization 1234567890 ==== ---- ####",
    "日本語の文章です。日本語の文章です。Ångström naïve café",
    "aaaaaaaaaaaaaaaa bbbbbbbbbbbb 日日日日日日 éééééé",
]
ADDED = ["<|im_start|>", "<|padding of a long name|>", "éééééééé"]
ALPHABET = (
    "abcXYZ019 .#=-\n\t\r\x01\x7f\u3000\u00a0\u00e9e\u0301日本한\u1112\u1161\u11ab\u212bﬁ\U0001f600"
)


def byte_level(normalizer: normalizers.Normalizer | None = None) -> tokenizers.Tokenizer:
    trained = tokenizers.Tokenizer(models.BPE())
    if normalizer is not None:
        trained.normalizer = normalizer
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    trained.train_from_iterator(CORPUS * 20, trainer)
    trained.add_tokens(ADDED)
    return trained


def sentencepiece() -> tokenizers.Tokenizer:
    """As Llama 2 has it: spaces become marks, bytes stand for what has no piece."""
    trained = tokenizers.Tokenizer(models.BPE())
    trained.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    letters = sorted({*map(chr, range(33, 127))})
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        show_progress=False,
        initial_alphabet=letters,
        special_tokens=["<unk>", *(f"<0x{byte:02X}>" for byte in range(256))],
    )
    trained.train_from_iterator(CORPUS * 20, trainer)
    content = json.loads(trained.to_str())
    content["model"] |= {"byte_fallback": True, "unk_token": "<unk>", "fuse_unk": True}
    return tokenizers.Tokenizer.from_str(json.dumps(content))


TOKENIZERS = {
    "byte level": byte_level(),
    "byte level, NFC": byte_level(normalizers.NFC()),
    "byte level, NFKC and lower case": byte_level(
        normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    ),
    "SentencePiece": sentencepiece(),
    "bytes": byte_tokenizer(),
}


@pytest.mark.parametrize("name", TOKENIZERS)
@given(text=st.text(st.sampled_from(ALPHABET), max_size=300) | st.text(max_size=300))
def test_a_text_has_at_least_so_many_tokens(name: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]
    bound = TokenBound.of(tokenizer)
    assert bound.at_least(text) <= len(tokenizer.encode(text).ids)


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("text", [*CORPUS, *ADDED, "1", "Z", "=", "日本", "=" * 7])
def test_what_the_vocabulary_has_as_one_token_counts_so(name: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]
    repeated = text * 50
    assert TokenBound.of(tokenizer).at_least(repeated) <= len(tokenizer.encode(repeated).ids)


@pytest.mark.parametrize(
    ("name", "text", "least"),
    [
        ("byte level", "1" * 1000, 90),
        ("byte level", "x" * 1000, 30),
        ("byte level", "日" * 1000, 60),
        ("byte level, NFC", "1" * 1000, 90),
        ("byte level", "\x01" * 1000, 1000),
        ("byte level", "\n" * 1000, 1000),
        ("byte level, NFC", "\t" * 1000, 1000),
        ("SentencePiece", "\x01" * 1000, 1000),
        ("SentencePiece", "x" * 1000, 9),
        ("SentencePiece", "字" * 1000, 30),
    ],
)
def test_the_bound_is_tight_enough_to_refuse(name: str, text: str, least: int) -> None:
    assert TokenBound.of(TOKENIZERS[name]).at_least(text) >= least


@pytest.mark.parametrize(
    "change",
    [
        {"normalizer": {"type": "Replace", "pattern": {"Regex": "[0-9]+"}, "content": ""}},
        {
            "pre_tokenizer": {
                "type": "Split",
                "pattern": {"Regex": "\\d"},
                "behavior": "Removed",
                "invert": False,
            }
        },
        {"pre_tokenizer": {"type": "CharDelimiterSplit", "delimiter": "1"}},
    ],
)
def test_a_tokenizer_that_may_drop_text_proves_nothing(change: dict[str, Any]) -> None:
    content = json.loads(TOKENIZERS["byte level"].to_str()) | change
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(content))
    bound = TokenBound.of(tokenizer)
    for text in ("1" * 1000, "x1" * 500):
        assert bound.at_least(text) <= len(tokenizer.encode(text).ids)


@pytest.mark.parametrize("space", [" ", "\n", "\u3000", "\u00a0", "\u2003"])
@pytest.mark.parametrize("side", ["lstrip", "rstrip"])
def test_white_space_that_an_added_token_swallows_proves_nothing(space: str, side: str) -> None:
    tokenizer = byte_level()
    token = tokenizers.AddedToken("<mask>", special=True, **{side: True})
    tokenizer.add_special_tokens([token])
    text = space * 500 + "<mask>" if side == "lstrip" else "<mask>" + space * 500
    bound = TokenBound.of(tokenizer)
    assert bound.at_least(text) <= len(tokenizer.encode(text).ids) == 1
    assert bound.at_least("日" * 1000) >= 60


def test_an_added_token_stands_for_what_the_normalizer_makes_of_it() -> None:
    tokenizer = byte_level(normalizers.NFKC())
    tokenizer.add_tokens([tokenizers.AddedToken("\u2474" * 20, normalized=True)])  # (1)
    text = "(1)" * 20 * 100
    assert TokenBound.of(tokenizer).at_least(text) <= len(tokenizer.encode(text).ids) == 100


def test_a_letter_without_a_token_proves_nothing_about_letters() -> None:
    """Unknown letters side by side are one unknown token."""
    model = models.BPE(vocab={"<unk>": 0, "b": 1}, merges=[], unk_token="<unk>", fuse_unk=True)
    tokenizer = tokenizers.Tokenizer(model)
    assert len(tokenizer.encode("a" * 1000).ids) == 1
    assert TokenBound.of(tokenizer).at_least("a" * 1000) <= 1
