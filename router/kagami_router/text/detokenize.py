"""Ids back to text, one token at a time, never cutting a character.

Two ways. Nearly every tokenizer's decoder is a table in disguise: each token stands for a string
of bytes, and the text is their concatenation read as UTF-8 (byte-level BPE; SentencePiece with
byte fallback). For those a token costs one look-up. Any other decoder (WordPiece, say) is asked
for the text of a short window of tokens, again and again, and the difference is what is new.

In both, a token's leading space stays (there is always a prompt before it), bytes that can never
become a character turn into U+FFFD, and bytes that merely wait for the rest are not shown.
"""

import codecs
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from tokenizers import Tokenizer

REPLACEMENT = "\ufffd"
# A character has at most 4 bytes, so after that many unfinished tokens something is wrong.
MAX_UNFINISHED_TOKENS = 4
# Tokens of context: enough for a decoder that looks at neighbours, TGI takes as many.
CONTEXT_TOKENS = 5
# When the window is cut back to its context.
WINDOW_TOKENS = 12

_Json = Mapping[str, Any]


class Detokenizer(Protocol):
    """The text of one sequence, as it grows."""

    def step(self, token_id: int) -> str:
        """The characters this token completes, "" if none."""


class TextDecoder:
    """Makes a detokenizer for each sequence, and knows which tokens are not text."""

    def __init__(self, tokenizer: Tokenizer, eos_token_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        self.special: Mapping[int, str] = {
            token_id: token.content
            for token_id, token in added.items()
            if token.special or token_id in eos_token_ids
        }
        """Literal text of the tokens that are no part of a generated text."""
        decoder = json.loads(tokenizer.to_str()).get("decoder")
        read_piece = _piece_reader(decoder)
        self._pieces = None if read_piece is None else _Pieces(tokenizer, read_piece)

    def start(self, prompt_ids: Sequence[int]) -> Detokenizer:
        """The detokenizer of a new sequence."""
        if self._pieces is not None:
            return TableDetokenizer(self._pieces)
        return WindowDetokenizer(self._tokenizer, prompt_ids[-CONTEXT_TOKENS:])

    def piece(self, token_id: int) -> str | bytes:
        """What one token stands for: a text, or the bytes of an unfinished character."""
        if (literal := self.special.get(token_id)) is not None:
            return literal
        return self.text_of(token_id) if self._pieces is None else self._pieces[token_id]

    def text_of(self, token_id: int) -> str:
        """One token on its own, special or not."""
        return self._tokenizer.decode([token_id], skip_special_tokens=False)


class _Pieces(dict[int, str | bytes]):
    """What each token stands for: a string where it is whole characters, else bytes."""

    def __init__(self, tokenizer: Tokenizer, read_piece: "_PieceReader") -> None:
        super().__init__()
        self._tokenizer = tokenizer
        self._read_piece = read_piece

    def __missing__(self, token_id: int) -> str | bytes:
        piece: str | bytes = self._read_piece(self._tokenizer.id_to_token(token_id) or "")
        try:
            piece = piece.decode() if isinstance(piece, bytes) else piece
        except UnicodeDecodeError:
            pass
        self[token_id] = piece
        return piece


class TableDetokenizer:
    """Bytes of tokens put together, read as UTF-8."""

    __slots__ = ("_is_unfinished", "_pieces", "_utf8")

    def __init__(self, pieces: _Pieces) -> None:
        self._pieces = pieces
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._is_unfinished = False

    def step(self, token_id: int) -> str:
        piece = self._pieces[token_id]
        if isinstance(piece, str):
            if not self._is_unfinished:
                return piece
            piece = piece.encode()
        text = self._utf8.decode(piece)
        self._is_unfinished = bool(self._utf8.getstate()[0])
        return text


class WindowDetokenizer:
    """What a decoder makes of the last few tokens, less what it made of them before."""

    __slots__ = ("_num_shown", "_num_unfinished", "_shown", "_tokenizer", "_window")

    def __init__(self, tokenizer: Tokenizer, context: Sequence[int]) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._shown = ""
        self._num_shown = 0
        self._num_unfinished = 0
        self._restart(context)

    def step(self, token_id: int) -> str:
        self._window.append(token_id)
        text = self._decode(self._window)
        if text.endswith(REPLACEMENT) and self._num_unfinished < MAX_UNFINISHED_TOKENS:
            self._num_unfinished += 1
            text = text.rstrip(REPLACEMENT)
            is_whole = False
        else:
            self._num_unfinished = 0
            is_whole = True
        if text.startswith(self._shown):
            new = text[len(self._shown) :]
        elif is_whole:
            # The decoder changed its mind about text that is out: go on with what is not.
            new = self._decode(self._window[self._num_shown :])
        else:
            return ""
        if new:
            self._shown = text
        if is_whole:
            self._num_shown = len(self._window)
            if self._num_shown > WINDOW_TOKENS:
                self._restart(self._window[-CONTEXT_TOKENS:])
        return new

    def _restart(self, context: Sequence[int]) -> None:
        self._window = list(context)
        self._shown = self._decode(self._window)
        self._num_shown = len(self._window)

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=False)


class _PieceReader(Protocol):
    """What a token of the vocabulary stands for."""

    def __call__(self, token: str, /) -> str | bytes: ...


def _piece_reader(decoder: _Json | None) -> _PieceReader | None:
    """How to read single tokens, if the decoder works on each for itself."""
    if decoder is None:
        return None
    if decoder["type"] == "ByteLevel":
        return _read_byte_level
    if decoder["type"] == "Metaspace":
        space = decoder["replacement"]
        return lambda token: token.replace(space, " ")
    if decoder["type"] == "Sequence":
        return _sequence_reader(decoder["decoders"])
    return None


def _sequence_reader(steps: list[_Json]) -> _PieceReader | None:
    """SentencePiece's steps: Replace, ByteFallback, Fuse, and a Strip of the whole text."""
    replacements: list[tuple[str, str]] = []
    has_bytes = is_fused = False
    for step in steps:
        match step:
            case {"type": "Replace", "pattern": {"String": pattern}, "content": content}:
                replacements.append((pattern, content))
            case {"type": "ByteFallback"}:
                has_bytes = True
            case {"type": "Fuse"}:
                is_fused = True
            case {"type": "Strip", "content": " ", "stop": 0} if is_fused:
                pass  # it is about the first token of all, and that is the prompt's
            case {"type": "ByteLevel"} if len(steps) == 1:
                return _read_byte_level
            case _:
                return None

    def read(token: str) -> str | bytes:
        if has_bytes and (match := re.fullmatch("<0x([0-9A-F]{2})>", token)):
            return bytes.fromhex(match[1])
        for pattern, content in replacements:
            token = token.replace(pattern, content)
        return token

    return read


def _byte_of_character() -> dict[str, int]:
    """GPT-2's alphabet: printable bytes stand for themselves, the rest for U+0100 and up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(0x100) if chr(byte) not in table)
    table.update({chr(0x100 + index): byte for index, byte in enumerate(others)})
    return table


_BYTES = _byte_of_character()


def _read_byte_level(token: str) -> str | bytes:
    try:
        return bytes(_BYTES[character] for character in token)
    except KeyError:
        return token
