"""Text from ids, one at a time."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.fakes.byte_tokenizer import alphabet, byte_tokenizer
from tokenizers import AddedToken, Tokenizer, decoders, models

from kagami_router.text.detokenize import (
    Detokenizer,
    TableDetokenizer,
    TextDecoder,
    WindowDetokenizer,
)

TEXTS = [
    "",
    "plain",
    "naïve café",
    "日本語のテキスト",
    "👩‍👩‍👧 family",
    "a\u0301 b",
    "mixed 漢字 and ascii",
]


def sentencepiece_tokenizer() -> Tokenizer:
    """Llama 2's decoder: a space mark, byte tokens, and a strip at the beginning."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁Hello", "▁world", "s", "▁"]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens([AddedToken("</s>", special=True, normalized=False)])
    return tokenizer


def wordpiece_tokenizer() -> Tokenizer:
    """A decoder that looks at neighbours."""
    words = ["[UNK]", "play", "##ing", "##s", "do", "n", "'", "t", ".", "well"]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def start(tokenizer: Tokenizer, prompt_ids: list[int]) -> Detokenizer:
    return TextDecoder(tokenizer, frozenset()).start(prompt_ids)


def both(tokenizer: Tokenizer, prompt_ids: list[int]) -> list[Detokenizer]:
    """The detokenizer with a table, and the one that asks the decoder."""
    quick = start(tokenizer, prompt_ids)
    assert isinstance(quick, TableDetokenizer)
    return [quick, WindowDetokenizer(tokenizer, prompt_ids)]


@pytest.mark.parametrize("text", TEXTS)
def test_all_text_comes_out_and_no_character_is_cut(text: str) -> None:
    for detokenizer in both(byte_tokenizer(), [65]):
        pieces = [detokenizer.step(byte) for byte in text.encode()]
        assert "".join(pieces) == text
        assert "\ufffd" not in pieces


def test_an_unfinished_character_is_not_shown() -> None:
    for detokenizer in both(byte_tokenizer(), [65]):
        assert [detokenizer.step(byte) for byte in "né".encode()[:2]] == ["n", ""]


def test_a_token_with_a_whole_and_a_half_character_shows_the_whole() -> None:
    letters = alphabet()
    piece = "".join(letters[byte] for byte in "é".encode() + "漢".encode()[:1])
    tokenizer = byte_tokenizer()
    vocabulary = tokenizer.get_vocab(with_added_tokens=False) | {piece: 300}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    for detokenizer in both(tokenizer, [65]):
        texts = [detokenizer.step(token_id) for token_id in [300, *"漢".encode()[1:]]]
        assert texts == ["é", "", "漢"]


def test_bytes_that_never_become_a_character_are_replaced() -> None:
    detokenizer = start(byte_tokenizer(), [65])
    assert "".join(map(detokenizer.step, b"a\xffb")) == "a\ufffdb"


def test_the_first_token_keeps_its_leading_space() -> None:
    tokenizer = sentencepiece_tokenizer()
    hello, world = map(tokenizer.token_to_id, ["▁Hello", "▁world"])
    for detokenizer in both(tokenizer, [hello]):
        assert [detokenizer.step(world), detokenizer.step(hello)] == [" world", " Hello"]


def test_byte_tokens_between_words_become_characters() -> None:
    tokenizer = sentencepiece_tokenizer()
    ids = [1 + byte for byte in "é漢".encode()]
    for detokenizer in both(tokenizer, [tokenizer.token_to_id("▁Hello")]):
        texts = [detokenizer.step(token_id) for token_id in ids]
        assert texts == ["", "é", "", "", "漢"]
        assert detokenizer.step(tokenizer.token_to_id("s")) == "s"


def test_a_decoder_that_looks_at_neighbours_is_asked() -> None:
    tokenizer = wordpiece_tokenizer()
    detokenizer = start(tokenizer, [1])
    assert isinstance(detokenizer, WindowDetokenizer)
    ids = [2, 4, 9, 3] * 10
    whole = tokenizer.decode([1, *ids], skip_special_tokens=False)
    assert "play" + "".join(map(detokenizer.step, ids)) == whole


def test_special_tokens_and_marked_ends_are_no_text() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken("<end>", special=False), AddedToken("<tool>", special=False)])
    decoder = TextDecoder(tokenizer, frozenset({257}))
    assert decoder.special == {256: "<eos>", 257: "<end>"}
    assert decoder.text_of(258) == "<tool>"
    assert decoder.start([65]).step(258) == "<tool>"


def test_an_id_without_a_token_is_no_text() -> None:
    for detokenizer in both(byte_tokenizer(), [65]):
        assert detokenizer.step(5000) == ""
        assert detokenizer.step(66) == "B"


@given(st.text(), st.integers(0, 3))
def test_a_cut_anywhere_loses_only_the_unfinished_character(text: str, cut: int) -> None:
    data = text.encode(errors="ignore")
    data = data[: max(0, len(data) - cut)]
    detokenizer = start(byte_tokenizer(), [65])
    shown = "".join(map(detokenizer.step, data))
    assert shown == data.decode(errors="ignore")
