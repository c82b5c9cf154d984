"""A lower bound on the number of tokens of a text, from counts of its characters.

A text that cannot fit need not be tokenized. If no token of the vocabulary holds more than m
characters of a class (digits, say), then a text with n of them has n / m tokens or more. This is
a proof only where the tokenizer neither drops nor merges characters of the class on the way to its
model; where that is not known, the bound is 0. Reads a tokenizer's description; knows no limits.
"""

import json
import string
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import tokenizers

from kagami_router.text.detokenize import BYTE_CHARACTERS, read_byte_level

_Json = Mapping[str, Any]

_CLASSES = tuple(
    characters.encode() for characters in (string.digits, string.ascii_letters, string.punctuation)
)
# Control characters: no white space, and no normalizer changes them.
_CONTROLS = bytes([*range(0x09), *range(0x0E, 0x1C), 0x7F])
_SPACES = (b" ", b"\t", b"\n", b"\r")
_OTHERS = bytes(range(128, 256))
# An added token may swallow any amount of white space beside it, and some pre-tokenizers drop it:
# bytes that are part of white space beyond ASCII (Unicode's White_Space) prove nothing.
_OTHER_SPACES = "\x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(
    map(chr, range(0x2000, 0x200B))
)
_OTHERS_BUT_SPACES = _OTHERS.translate(None, _OTHER_SPACES.encode())
# The bytes that UTF-8 uses (RFC 3629, section 4).
_IN_UTF8 = frozenset(range(256)) - {0xC0, 0xC1, *range(0xF5, 0x100)}
_FALLBACK = tuple(f"<0x{byte:02X}>" for byte in sorted(_IN_UTF8))
# Normalizers that leave ASCII digits, letters and punctuation in their class. Those of Unicode may
# merge one with the characters behind it that are not ASCII: those are subtracted.
_KEEPS_ASCII = frozenset({"NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Strip", "Prepend"})
_KEEPS_ALL = frozenset({"Prepend"})
_KEEPS_SPACES = _KEEPS_ASCII - {"Strip"}
# Pre-tokenizers that cut, and drop white space at most.
_CUTS = frozenset(
    {"ByteLevel", "Metaspace", "Whitespace", "WhitespaceSplit", "Digits", "UnicodeScripts"}
)
_CUTS_ALONE = frozenset({"ByteLevel", "Digits", "UnicodeScripts"})
_MODELS = frozenset({"BPE", "Unigram"})


@dataclass(frozen=True, slots=True)
class TokenBound:
    """The most characters of each class that one token holds."""

    classes: tuple[tuple[bytes, int], ...]
    """Bytes of a class, and how many of them are in the token that has most"""

    @classmethod
    def of(cls, tokenizer: tokenizers.Tokenizer) -> "TokenBound":
        """What the vocabulary of `tokenizer` proves."""
        description = json.loads(tokenizer.to_str())
        normalizers = list(_steps(description["normalizer"], "normalizers"))
        cuts = list(_steps(description["pre_tokenizer"], "pretokenizers"))
        model = description["model"]
        is_cut = all(step["type"] in _CUTS or _is_split(step) for step in cuts)
        has_affix = model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")
        if model["type"] not in _MODELS or has_affix or not is_cut:
            return cls(())
        vocabulary = tokenizer.get_vocab(with_added_tokens=False)
        is_byte_level = any(step["type"] == "ByteLevel" for step in cuts)
        tokens = [_bytes_of(token, is_byte_level=is_byte_level) for token in vocabulary]
        tokens += _texts_of_added(tokenizer)
        tokens.sort(key=len, reverse=True)
        # A character without a token may become unknown, or nothing.
        found = [each for each in _CLASSES if all(chr(one) in vocabulary for one in each)]
        if is_byte_level:
            known = bytes(byte for byte, one in BYTE_CHARACTERS if one in vocabulary)
        else:
            has_fallback = model.get("byte_fallback") and all(
                one in vocabulary for one in _FALLBACK
            )
            known = bytes(range(256)) if has_fallback else b""
        found += [_within(known, each) for each in (_CONTROLS, _OTHERS_BUT_SPACES)]
        if is_byte_level and _keeps_spaces(tokenizer, normalizers, cuts):
            found += [_within(known, each) for each in _SPACES]
        if not _are_all(normalizers, _KEEPS_ASCII):
            found = []
        elif not _are_all(normalizers, _KEEPS_ALL):
            found = [each for each in found if each.isascii()]
        return cls(tuple((each, max(1, _most(tokens, each))) for each in found if each))

    def at_least(self, text: str) -> int:
        """The text has so many tokens or more; costs 4 ms for a megabyte."""
        data = text.encode(errors="replace")
        num_others = _count(data, _OTHERS)
        bounds = [0]
        for characters, most in self.classes:
            number = _count(data, characters)
            if characters[0] < 0x80:
                number -= num_others
            bounds.append(-(-number // most))
        return max(bounds)


def _steps(step: _Json | None, name: str) -> Iterator[_Json]:
    """The steps of a sequence, or the one step that there is."""
    if step is None:
        return
    if step["type"] != "Sequence":
        yield step
        return
    for part in step[name]:
        yield from _steps(part, name)


def _are_all(normalizers: list[_Json], names: frozenset[str]) -> bool:
    """Each of `normalizers` is one of `names`, or replaces nothing but spaces."""
    return all(step["type"] in names or _replaces_space(step) for step in normalizers)


def _keeps_spaces(
    tokenizer: tokenizers.Tokenizer, normalizers: list[_Json], cuts: list[_Json]
) -> bool:
    added = tokenizer.get_added_tokens_decoder().values()
    return (
        all(step["type"] in _KEEPS_SPACES for step in normalizers)
        and all(step["type"] in _CUTS_ALONE or _is_split(step) for step in cuts)
        and not any(one.lstrip or one.rstrip for one in added)
    )


def _within(known: bytes, characters: bytes) -> bytes:
    return bytes(one for one in characters if one in known)


def _texts_of_added(tokenizer: tokenizers.Tokenizer) -> Iterator[bytes]:
    """The texts that added tokens stand for: as they are, and as the normalizer makes them."""
    for added in tokenizer.get_added_tokens_decoder().values():
        yield added.content.encode()
        if tokenizer.normalizer is not None:
            yield tokenizer.normalizer.normalize_str(added.content).encode()


def _is_split(step: _Json) -> bool:
    return step["type"] in ("Split", "Punctuation") and step["behavior"] != "Removed"


def _replaces_space(step: _Json) -> bool:
    return bool(step["type"] == "Replace" and step["pattern"] == {"String": " "})


def _bytes_of(token: str, *, is_byte_level: bool) -> bytes:
    """What a token of the model stands for; with a mark for a space more than that."""
    if not is_byte_level:
        return token.encode(errors="replace")
    read = read_byte_level(token)
    return read if isinstance(read, bytes) else read.encode(errors="replace")


def _most(tokens: list[bytes], characters: bytes) -> int:
    """The most of `characters` in one token; `tokens` are sorted, the longest first."""
    most = 0
    for token in tokens:
        if len(token) <= most:
            break
        most = max(most, _count(token, characters))
    return most


def _count(data: bytes, characters: bytes) -> int:
    if len(characters) == 1:
        return data.count(characters)
    return len(data) - len(data.translate(None, characters))
