"""Converts ids to text, one token at a time, and never splits a character.

There are two ways. Nearly every tokenizer's decoder is equal to a table: each token stands for a
string of bytes, and the text is their concatenation, decoded as UTF-8 (byte-level BPE;
SentencePiece with byte fallback). With such a table a token costs one look-up. Any other decoder
(WordPiece, for example) decodes a short window of tokens again for each token; the difference to
the text before is new.

In both ways a token's leading space stays, because there is always a prompt before it. Bytes that
can never become a character become U+FFFD. Bytes of a character that is still incomplete are held
back.
"""

import codecs
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from tokenizers import Tokenizer

REPLACEMENT = "\ufffd"
# A character has at most 4 bytes: after so many unfinished tokens, the bytes are shown as they are.
MAX_UNFINISHED_TOKENS = 4
# Tokens of context: enough for a decoder that looks at neighbours; the number is TGI's.
CONTEXT_TOKENS = 5
# A window of more tokens than this is cut to its context.
WINDOW_TOKENS = 12

_Json = Mapping[str, Any]


class Detokenizer(Protocol):
    """Decodes one sequence, token by token."""

    def step(self, token_id: int) -> str:
        """The characters that this token completes, "" if none."""


class TextDecoder:
    """Makes a detokenizer for each sequence; knows which tokens are special."""

    def __init__(self, tokenizer: Tokenizer, eos_token_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.get_added_tokens_decoder()
        self.special: Mapping[int, str] = {
            token_id: token.content
            for token_id, token in added.items()
            if token.special or token_id in eos_token_ids
        }
        """Special tokens, id -> literal text: they are not part of a generated text."""
        decoder = json.loads(tokenizer.to_str()).get("decoder")
        read_piece = _piece_reader(decoder)
        self._pieces = None if read_piece is None else _Pieces(tokenizer, read_piece)

    def start(self, prompt_ids: Sequence[int]) -> Detokenizer:
        """The detokenizer of a new sequence."""
        if self._pieces is not None:
            return TableDetokenizer(self._pieces)
        return WindowDetokenizer(self._tokenizer, prompt_ids[-CONTEXT_TOKENS:])

    def piece(self, token_id: int) -> str | bytes:
        """The text of one token, or its bytes if they are not whole characters."""
        if (literal := self.special.get(token_id)) is not None:
            return literal
        return self.text_of(token_id) if self._pieces is None else self._pieces[token_id]

    def text_of(self, token_id: int) -> str:
        """The text of one token decoded alone, special or not."""
        return self._tokenizer.decode([token_id], skip_special_tokens=False)


class _Pieces(dict[int, str | bytes]):
    """Token id -> its text, or its bytes if they are not whole characters. Filled on demand."""

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
    """Joins the bytes of tokens and decodes them as UTF-8."""

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
    """Decodes a window of the last tokens; new text is what the text before did not have."""

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
            # The decoder now decodes the text that was sent differently: send only the new tokens.
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
    """Reads a token of the vocabulary as text or bytes."""

    def __call__(self, token: str, /) -> str | bytes: ...


def _piece_reader(decoder: _Json | None) -> _PieceReader | None:
    """A reader of single tokens; None if the decoder needs a token's neighbours."""
    if decoder is None:
        return None
    if decoder["type"] == "ByteLevel":
        return read_byte_level
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
                pass  # it changes only the first token, which is the prompt's
            case {"type": "ByteLevel"} if len(steps) == 1:
                return read_byte_level
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
BYTE_CHARACTERS = tuple((byte, character) for character, byte in _BYTES.items())
"""The 256 bytes, each with the character for it in a byte-level vocabulary"""


def read_byte_level(token: str) -> str | bytes:
    """The bytes of a token of a byte-level vocabulary; an added token as it is."""
    try:
        return bytes(_BYTES[character] for character in token)
    except KeyError:
        return token
