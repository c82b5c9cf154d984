"""The key-values of a GGUF file are of the types that they must have, or refused by name."""

from typing import Any

import pytest

from kagami_launcher.convert.files import ConversionRefused
from kagami_launcher.convert.gguf_tokenizer import (
    Metadata,
    build_tokenizer,
    generation_config,
    tokenizer_config,
)

GOOD: dict[str, Any] = {
    "general.architecture": b"llama",
    "llama.context_length": 128,
    "tokenizer.ggml.model": b"gpt2",
    "tokenizer.ggml.pre": b"smollm",
    "tokenizer.ggml.tokens": [b"<s>", b"a", b"b", b"ab"],
    "tokenizer.ggml.token_type": [3, 1, 1, 1],
    "tokenizer.ggml.merges": [b"a b"],
    "tokenizer.ggml.bos_token_id": 0,
}
PIECES = {
    "tokenizer.ggml.model": b"llama",
    "tokenizer.ggml.scores": [0.0, -1.0, -2.0, -3.0],
    "tokenizer.ggml.unknown_token_id": 0,
}


def everything(values: dict[str, Any]) -> None:
    """All that a conversion reads of the text half."""
    metadata = Metadata(values)
    build_tokenizer(metadata)
    tokenizer_config(metadata)
    generation_config(metadata)


@pytest.mark.parametrize("more", [{}, PIECES])
def test_good_values_make_a_tokenizer(more: dict[str, Any]) -> None:
    everything({**GOOD, **more})


KEY = "tokenizer.ggml."


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"general.architecture": 5}, "`general.architecture` is 5, expected text"),
        ({"general.architecture": b"\xff"}, r"`general.architecture` is b'\\xff', which is not U"),
        ({f"{KEY}tokens": [b"a", b"\xff\xfe"]}, r"tokens` is b'\\xff\\xfe', which is not UTF-8"),
        ({f"{KEY}tokens": [1, 2]}, "tokens` is 1, expected text"),
        ({f"{KEY}tokens": b"abc"}, "tokens` is b'abc', expected an array"),
        ({f"{KEY}tokens": []}, "tokens` is missing or empty"),
        ({f"{KEY}model": b"bert"}, "tokenizer model `bert` is not supported yet"),
        ({f"{KEY}model": [b"gpt2"]}, "model` is a list of 1, expected text"),
        ({f"{KEY}pre": 3}, "pre` is 3, expected text"),
        ({f"{KEY}token_type": [3]}, "token_type` has 1 elements, and the vocabulary 4 tokens"),
        ({f"{KEY}token_type": [b"3"] * 4}, "token_type` is not an array of finite numbers"),
        ({f"{KEY}token_type": 3}, "token_type` is 3, expected an array"),
        ({f"{KEY}merges": [b"ab"]}, "merges`, element 0, is `ab`: not two tokens"),
        ({f"{KEY}merges": [b"a b", b"b a"]}, "merges`, element 1, is `b a`: not two tokens"),
        ({f"{KEY}merges": [b"a " + b"x" * 10**6]}, "merges`, element 0"),
        ({f"{KEY}bos_token_id": 4}, "bos_token_id` is 4, and the vocabulary has 4 tokens"),
        ({f"{KEY}eos_token_id": -1}, "eos_token_id` is -1"),
        ({f"{KEY}padding_token_id": 2**64 - 1}, "padding_token_id` is 18446744073709551615"),
        ({f"{KEY}unknown_token_id": 0.5}, "unknown_token_id` is 0.5"),
        ({f"{KEY}bos_token_id": True}, "bos_token_id` is True"),
        ({f"{KEY}add_bos_token": 1}, "add_bos_token` is 1, expected true or false"),
        ({"llama.context_length": 0}, "`llama.context_length` is 0, expected one number from 1"),
        ({"llama.context_length": [128]}, "`llama.context_length` is a list of 1"),
        ({"llama.context_length": 2**31}, "`llama.context_length` is 2147483648"),
        ({**PIECES, f"{KEY}scores": [0.0]}, "scores` has 1 elements, and the vocabulary 4"),
        ({**PIECES, f"{KEY}scores": [float("nan")] * 4}, "scores` is not an array of finite"),
        ({**PIECES, f"{KEY}scores": []}, "scores` is missing or empty"),
        ({**PIECES, f"{KEY}unknown_token_id": 9}, "unknown_token_id` is 9"),
        ({**PIECES, f"{KEY}add_space_prefix": b"yes"}, "add_space_prefix` is b'yes', expected"),
        ({**PIECES, f"{KEY}tokens": [b"a" * 10**5, b"b", b"c", b"d"]}, "to cut them everywhere"),
    ],
)
def test_a_value_of_another_kind_is_refused_by_its_key(change: dict[str, Any], why: str) -> None:
    with pytest.raises(ConversionRefused, match=why) as refusal:
        everything({**GOOD, **change})
    assert len(str(refusal.value)) < 300


@pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf"), 1e300, b"1", True, [1.0]])
def test_a_real_number_is_finite_and_above_zero(value: Any) -> None:
    metadata = Metadata({**GOOD, "llama.rope.freq_base": value})
    with pytest.raises(
        ConversionRefused, match=r"`llama\.rope\.freq_base` is .*, expected one fin"
    ):
        metadata.real("rope.freq_base", 10000.0)
