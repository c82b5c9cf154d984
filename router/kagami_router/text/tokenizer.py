"""Converts text to ids: the model folder's tokenizer and its special tokens.

Knows the files of a checkpoint (`tokenizer.json`, `tokenizer_config.json`) and the `tokenizers`
library. Knows no limits and no HTTP. detokenize.py converts ids to text.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers

from kagami_proto.errors import InvalidRequest
from kagami_proto.model_files import read_optional_object, special_token_text
from kagami_proto.panics import exception_of
from kagami_router.text.encode_queue import EncodeQueue
from kagami_router.text.growth import check_growth
from kagami_router.text.token_bound import TokenBound

# Encoding costs 0.2 us a character, using a thread about 0.1 ms: up to this length (0.4 ms) the
# event loop encodes a text itself.
INLINE_CHARACTERS = 2048
# The largest tokenizer.json known has 40 MB.
_MAX_FILE_BYTES = 256 << 20
# Decoding this many tokens takes as long.
INLINE_TOKENS = 1024


class TextToken(NamedTuple):
    """One token of a text: the bytes `start` to `stop` of its UTF-8 form."""

    id: int
    text: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class SpecialTokens:
    """The texts that a chat template may name; None if the model does not define one."""

    bos: str | None
    eos: str | None
    others: Mapping[str, str]

    def named(self) -> dict[str, str]:
        """The existing ones by name; a template sees no others, as in `transformers`."""
        known = {"bos_token": self.bos, "eos_token": self.eos, **self.others}
        return {name: text for name, text in known.items() if text is not None}


class Tokenizer:
    """Encodes prompts; long ones in `queue`, so that the event loop is not blocked.

    The library's `encode` holds Python's lock (1 s for a megabyte). `encode_batch_fast` releases it
    and is twice as fast, so prompts are encoded as batches of one.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, queue: EncodeQueue) -> None:
        # Padding and truncation saved by a training script have no place in a server.
        tokenizer.no_padding()
        tokenizer.no_truncation()
        self.backend = tokenizer
        self._queue = queue
        self._bound = TokenBound.of(tokenizer)

    def at_least(self, text: str) -> int:
        """`text` has so many tokens or more; costs 4 ms for a megabyte."""
        return self._bound.at_least(text)

    async def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """The ids of `text`; raises `InvalidRequest` if the tokenizer fails."""
        if len(text) <= INLINE_CHARACTERS:
            return self._encode(text, add_special_tokens)
        return await self._queue.run(len(text), partial(self._encode, text, add_special_tokens))

    async def spans(self, text: str, *, add_special_tokens: bool) -> list[TextToken]:
        """The tokens of `text` with byte offsets; tokens that the tokenizer adds have no text."""
        if len(text) <= INLINE_CHARACTERS:
            return self._spans(text, add_special_tokens)
        return await self._queue.run(len(text), partial(self._spans, text, add_special_tokens))

    async def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, with the text of special tokens."""
        if len(ids) <= INLINE_TOKENS:
            return self._decode(ids)
        return await self._queue.run(len(ids), partial(self._decode, ids))

    def _decode(self, ids: Sequence[int]) -> str:
        try:
            text: str = self.backend.decode(ids, skip_special_tokens=False)
        except BaseException as error:  # the Rust library raises bare Exceptions, and panics
            raise InvalidRequest(f"tokenizer error {exception_of(error)}") from error
        return text

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        try:
            encoding = self.backend.encode_batch_fast(
                [text], add_special_tokens=add_special_tokens
            )[0]
        except BaseException as error:  # the Rust library raises bare Exceptions, and panics
            raise InvalidRequest(f"tokenizer error {exception_of(error)}") from error
        ids: list[int] = encoding.ids
        return ids

    def _spans(self, text: str, add_special_tokens: bool) -> list[TextToken]:
        try:
            encoding = self.backend.encode_batch([text], add_special_tokens=add_special_tokens)[0]
        except BaseException as error:  # the Rust library raises bare Exceptions, and panics
            raise InvalidRequest(f"tokenizer error {exception_of(error)}") from error
        byte_at = _byte_offsets(text)
        return [
            TextToken(token_id, text[start:stop], byte_at(start), byte_at(stop))
            for token_id, (start, stop) in zip(encoding.ids, encoding.offsets, strict=True)
        ]


def _byte_offsets(text: str) -> Any:
    """A function that maps an offset in characters to the offset in UTF-8 bytes."""
    if text.isascii():
        return int
    offsets = [0]
    for character in text:
        offsets.append(offsets[-1] + len(character.encode()))
    return offsets.__getitem__


def load(folder: Path, queue: EncodeQueue) -> Tokenizer:
    """Read `tokenizer.json` of a model folder; raises `FileNotFoundError` or `ValueError`."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist: the launcher makes it, or give --tokenizer-name a folder"
            " that has it"
        )
    if (size := path.stat().st_size) > _MAX_FILE_BYTES:
        raise ValueError(f"{path} has {size} bytes, the limit is {_MAX_FILE_BYTES}")
    try:
        found = tokenizers.Tokenizer.from_file(str(path))
        check_growth(found)
        return Tokenizer(found, queue)
    except BaseException as error:  # the Rust library raises bare Exceptions, and panics
        raise ValueError(f"{path} is no tokenizer: {exception_of(error)}") from error


def special_tokens(folder: Path, given: Path | None = None) -> SpecialTokens:
    """The special tokens that a model's files name, as `transformers` reads them.

    `given` is --tokenizer-config-path. Older checkpoints have special_tokens_map.json: it has
    precedence over a tokenizer_config.json without `added_tokens_decoder`.
    """
    config = read_optional_object(folder / "tokenizer_config.json")
    if given is not None and given.suffix != ".jinja":
        config = {**config, **read_optional_object(given)}
    if "added_tokens_decoder" not in config:
        older = read_optional_object(folder / "special_tokens_map.json")
        config = {**config, **{name: value for name, value in older.items() if value is not None}}
    extra = config.get("extra_special_tokens")
    named = {
        key: text
        for key, value in {**(extra if isinstance(extra, dict) else {}), **config}.items()
        if key.endswith("_token") and (text := special_token_text(value)) is not None
    }
    return SpecialTokens(named.pop("bos_token", None), named.pop("eos_token", None), named)
