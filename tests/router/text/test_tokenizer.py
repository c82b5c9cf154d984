import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.fakes.byte_tokenizer import byte_tokenizer_with_start
from tests.fakes.panics import panicking_tokenizer

from kagami_proto.errors import InvalidRequest
from kagami_router.text import tokenizer
from kagami_router.text.encode_queue import EncodeQueue
from kagami_router.text.tokenizer import INLINE_CHARACTERS, INLINE_TOKENS, Tokenizer


async def test_saved_truncation_and_padding_are_switched_off(tmp_path: Path) -> None:
    backend = byte_tokenizer_with_start()
    backend.enable_truncation(4)
    backend.enable_padding(length=8)
    backend.save(str(tmp_path / "tokenizer.json"))
    with ThreadPoolExecutor(1) as threads:
        loaded = tokenizer.load(tmp_path, EncodeQueue(threads, 1))
        assert len(await loaded.encode("abcdef", add_special_tokens=True)) == 7


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with (
        ThreadPoolExecutor(1) as threads,
        pytest.raises(FileNotFoundError, match=r"tokenizer\.json does not exist"),
    ):
        tokenizer.load(tmp_path, EncodeQueue(threads, 1))


@pytest.mark.parametrize("length", [3, INLINE_CHARACTERS + 1])
async def test_special_tokens_are_added_on_demand(length: int) -> None:
    with ThreadPoolExecutor(1) as threads:
        encoder = Tokenizer(byte_tokenizer_with_start(), EncodeQueue(threads, 1))
        with_bos = await encoder.encode("a" * length, add_special_tokens=True)
        without = await encoder.encode("a" * length, add_special_tokens=False)
        assert with_bos == [0, *without]
        assert len(await encoder.spans("a" * length, add_special_tokens=True)) == length + 1


@given(st.text())
async def test_spans_are_byte_slices(text: str) -> None:
    with ThreadPoolExecutor(1) as threads:
        spans = await Tokenizer(byte_tokenizer_with_start(), EncodeQueue(threads, 1)).spans(
            text, add_special_tokens=False
        )
    encoded = text.encode()
    assert all(encoded[one.start : one.stop].decode() == one.text for one in spans)
    assert len(spans) == len(encoded)


def test_special_tokens_come_as_text_or_object(tmp_path: Path) -> None:
    config = {
        "bos_token": {"content": "<s>"},
        "eos_token": "</s>",
        "unk_token": None,
        "pad_token": "<pad>",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokens = tokenizer.special_tokens(tmp_path)
    assert (tokens.bos, tokens.eos) == ("<s>", "</s>")
    assert tokens.others == {"pad_token": "<pad>"}


@pytest.mark.parametrize("count", [1, INLINE_TOKENS + 1])
async def test_a_panic_of_the_library_is_an_error_of_the_request(count: int) -> None:
    with ThreadPoolExecutor(1) as threads:
        with pytest.raises(InvalidRequest, match=r"tokenizer error .*slice index"):
            await Tokenizer(panicking_tokenizer(), EncodeQueue(threads, 1)).decode([97] * count)
