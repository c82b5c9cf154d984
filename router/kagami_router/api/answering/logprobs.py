"""Log-probabilities as OpenAI's routes write them: a chat's list of objects, completions' columns.

Every token has an entry at once, with its text from the vocabulary. This includes tokens whose text
is still held back for a stop string or for the rest of a character.
"""

import codecs
from collections.abc import Iterable, Sequence

from kagami_router.api.schemas.encoding import shortest
from kagami_router.api.schemas.openai import (
    ChatLogprob,
    ChatLogprobs,
    CompletionLogprobs,
    TopLogprob,
)
from kagami_router.request.values import PrefillToken, Token
from kagami_router.text.detokenize import TextDecoder

# OpenAI's sign for "as good as impossible"; its clients read numbers only.
_IMPOSSIBLE = -9999.0


def chat_logprobs(
    decoder: TextDecoder, tokens: Iterable[tuple[Token, Sequence[Token]]]
) -> ChatLogprobs:
    """Generated tokens, each with its alternatives."""
    content = []
    for token, alternatives in tokens:
        tops = [TopLogprob(*_named(decoder, one)) for one in alternatives]
        text, logprob, its_bytes = _named(decoder, token)
        content.append(ChatLogprob(text, logprob, its_bytes, tops))
    return ChatLogprobs(content)


class Columns:
    """Collects the `logprobs` of one completion.

    Offsets count characters from the start of the prompt, as OpenAI's do, even if the answer does
    not repeat the prompt.
    """

    def __init__(self, decoder: TextDecoder, prompt: str) -> None:
        self._decoder = decoder
        self._prompt = prompt
        self._offset = len(prompt)
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._entries: list[_Entry] = []

    def add_prompt(self, tokens: Sequence[PrefillToken]) -> None:
        """Add the tokens of the prompt; call it before `add`."""
        prompt = self._prompt
        offset, is_start = 0, True
        utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        for token in tokens:
            piece = self._decoder.piece(token.id)
            logprob = None if token.logprob is None else _finite(token.logprob)
            if (literal := self._decoder.special.get(token.id)) is not None:
                # A special token that the tokenizer added is not in the text.
                length = len(literal) if prompt.startswith(literal, offset) else 0
            else:
                # SentencePiece adds a space before the first word; the text does not have it.
                if is_start and isinstance(piece, str) and not prompt.startswith(" ", offset):
                    piece = piece.removeprefix(" ")
                is_start = False
                length = len(utf8.decode(_bytes_of(piece)))
            self._add(piece, logprob, token.top_tokens, min(offset, len(prompt)))
            offset += length

    def add(self, token: Token, alternatives: Sequence[Token]) -> None:
        """Add the next generated token."""
        piece = self._decoder.piece(token.id)
        self._add(piece, _finite(token.logprob), alternatives, self._offset)
        if not token.special:
            self._offset += len(self._utf8.decode(_bytes_of(piece)))

    def take(self) -> CompletionLogprobs:
        """Return the entries that were added since the last call, and forget them."""
        entries, self._entries = self._entries, []
        return CompletionLogprobs(
            tokens=[text for text, *_ in entries],
            token_logprobs=[logprob for _, logprob, *_ in entries],
            top_logprobs=[tops for _, _, tops, _ in entries],
            text_offset=[offset for *_, offset in entries],
        )

    def _add(
        self, piece: str | bytes, logprob: float | None, tops: Sequence[Token], offset: int
    ) -> None:
        text = _legacy_text(piece)
        if logprob is None:
            self._entries.append((text, None, None, offset))
            return
        named: dict[str, float] = {}
        for top in tops:  # two tokens of one name: the likelier one
            named.setdefault(_legacy_text(self._decoder.piece(top.id)), _finite(top.logprob))
        named.setdefault(text, logprob)
        self._entries.append((text, logprob, named, offset))


_Entry = tuple[str, float | None, dict[str, float] | None, int]


def _named(decoder: TextDecoder, token: Token) -> tuple[str, float, list[int]]:
    """Text, logprob and bytes of a chat token; bytes of a partial character are escaped."""
    piece = decoder.piece(token.id)
    text = piece if isinstance(piece, str) else _escaped(piece)
    return text, _finite(token.logprob), list(_bytes_of(piece))


def _legacy_text(piece: str | bytes) -> str:
    return piece if isinstance(piece, str) else f"bytes:{_escaped(piece)}"


def _escaped(piece: bytes) -> str:
    return "".join(f"\\x{byte:02x}" for byte in piece)


def _bytes_of(piece: str | bytes) -> bytes:
    return piece.encode() if isinstance(piece, str) else piece


def _finite(logprob: float) -> float:
    number = shortest(logprob)
    return _IMPOSSIBLE if number is None else number
