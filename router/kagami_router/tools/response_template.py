"""A checkpoint's own description of its answers: `response_template` of tokenizer_config.json.

It names the fields of a message and what begins and ends each of them in the text. The format is
version 1 of transformers' chat response parsing
(https://huggingface.co/docs/transformers/chat_response_parsing).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import regex

from kagami_router.tools.region_values import KINDS, check_shape, read_value, transformed

_SPEC_KEYS = frozenset(("version", "defaults", "fields", "start_anchor", "start_anchor_pattern"))
_FIELD_KEYS = frozenset(
    "open open_pattern close close_pattern content content_args repeats join optional"
    " transform transform_each".split()
)


class Found(NamedTuple):
    """A delimiter in a text."""

    start: int
    end: int
    groups: Mapping[str, str]
    is_pending: bool
    """More text could change what was found"""


@dataclass(frozen=True, slots=True)
class Delimiter:
    """What begins or ends a field: some literal texts, or a pattern."""

    pattern: "regex.Pattern[str]"
    literals: tuple[str, ...] = ()

    @classmethod
    def read(cls, place: str, spec: Mapping[str, Any], name: str) -> "Delimiter | None":
        """The delimiter `name` or `name`_pattern of a field; raises `ValueError`."""
        given, pattern = spec.get(name), spec.get(f"{name}_pattern")
        if given is not None and pattern is not None:
            raise ValueError(f"{place}: `{name}` and `{name}_pattern` exclude each other")
        if pattern is not None:
            try:
                return cls(regex.compile(pattern, regex.DOTALL))
            except (regex.error, TypeError) as error:
                raise ValueError(f"{place}.{name}_pattern: {error}") from error
        if given is None:
            return None
        literals = [given] if isinstance(given, str) else given
        is_list = isinstance(literals, list) and all(isinstance(one, str) for one in literals)
        if not is_list or not literals or "" in literals:
            raise ValueError(f"{place}.{name} must be a text or a list of texts, none empty")
        longest_first = sorted(dict.fromkeys(literals), key=len, reverse=True)
        joined = "|".join(map(regex.escape, longest_first))
        return cls(regex.compile(joined, regex.DOTALL), tuple(longest_first))

    def find(self, text: str, at: int, *, is_end: bool) -> Found | None:
        """The first place behind `at`; `is_end`: no more text follows."""
        match = self.pattern.search(text, at, partial=not is_end)
        if match is None:
            return None
        groups = {name: said for name, said in match.groupdict().items() if said is not None}
        is_pending = not is_end and (match.partial or self._may_grow(text, match))
        return Found(match.start(), match.end(), groups, is_pending)

    def _may_grow(self, text: str, match: "regex.Match[str]") -> bool:
        if match.end() < len(text):
            if self.literals:
                return False
            # A pattern may lean on the end of the text: then another character changes the match.
            again = self.pattern.match(text + "\0", match.start())
            return again is None or (again.span(), again.groupdict()) != (
                match.span(),
                match.groupdict(),
            )
        if not self.literals:
            return True
        return any(one != match[0] and one.startswith(match[0]) for one in self.literals)


@dataclass(frozen=True, slots=True)
class Field:
    """One member of the message."""

    name: str
    opener: Delimiter | None
    """None: all text that no other field takes"""
    closer: Delimiter | None
    kind: str
    options: Mapping[str, Any]
    shape: Any
    """What the value becomes; None = itself"""
    is_shaped_each: bool

    @property
    def is_thoughts(self) -> bool:
        """Whether it has what the model thinks before it answers."""
        return self.name in ("reasoning_content", "reasoning", "thinking")

    @property
    def is_text(self) -> bool:
        """Whether the value is the text of the region, but for white space at its ends."""
        return self.kind == "text" and self.shape is None

    def value(self, text: str, captures: Mapping[str, str]) -> Any:
        """What a region of this field says; raises `ValueError`."""
        value = read_value(self.kind, text, self.options)
        if self.shape is None:
            return value
        if not self.is_shaped_each:
            return transformed(self.shape, {**captures, "content": value})
        if not isinstance(value, list) or not all(isinstance(one, Mapping) for one in value):
            raise ValueError("no list of objects")
        return [transformed(self.shape, {**captures, **one}) for one in value]


@dataclass(frozen=True, slots=True)
class ResponseTemplate:
    """How answers of one model are taken apart."""

    fields: tuple[Field, ...]
    anchor: Delimiter
    """The last one in a prompt is where the message begins"""
    source: str = field(repr=False)
    """All delimiters as they were written"""

    @property
    def rest(self) -> Field | None:
        """The field of all text that no other one takes."""
        return next((one for one in self.fields if one.opener is None), None)

    def begun(self, prompt: str) -> str:
        """The part of a prompt that belongs to the message."""
        end = 0
        for match in self.anchor.pattern.finditer(prompt):
            end = match.end()
        return prompt[end:]

    def knows(self, token: str) -> bool:
        """Whether a special token with this text may stand in a delimiter."""
        return token in self.source


def read_template(spec: object) -> ResponseTemplate:
    """The template in the member of a tokenizer_config.json; raises `ValueError`."""
    if not isinstance(spec, Mapping):
        raise ValueError("response_template must be an object")
    if spec.get("version", 1) != 1:
        raise ValueError(f"response_template.version must be 1. Given: {spec['version']}")
    _check_keys("response_template", spec, _SPEC_KEYS)
    given = spec.get("fields")
    if not isinstance(given, Mapping) or not given:
        raise ValueError("response_template.fields must be an object with members")
    fields = tuple(_read_field(f"fields.{name}", name, one) for name, one in given.items())
    if sum(one.opener is None for one in fields) > 1:
        raise ValueError("response_template: more than one field has no `open`")
    anchor = Delimiter.read("response_template", spec, "start_anchor")
    if anchor is None:
        raise ValueError("response_template.start_anchor is missing")
    return ResponseTemplate(fields, anchor, _delimiters(fields))


def _read_field(place: str, name: str, spec: object) -> Field:
    if not isinstance(spec, Mapping):
        raise ValueError(f"{place} must be an object")
    _check_keys(place, spec, _FIELD_KEYS)
    kind = spec.get("content", "text")
    if kind not in KINDS:
        raise ValueError(f"{place}.content must be one of {', '.join(KINDS)}. Given: {kind}")
    shape = spec.get("transform")
    check_shape(shape)
    return Field(
        name,
        Delimiter.read(place, spec, "open"),
        Delimiter.read(place, spec, "close"),
        kind,
        spec.get("content_args", {}),
        shape,
        spec.get("transform_each") is True,
    )


def _check_keys(place: str, spec: Mapping[str, Any], known: frozenset[str]) -> None:
    if unknown := spec.keys() - known:
        raise ValueError(f"{place} has members that are not known: {', '.join(sorted(unknown))}")


def _delimiters(fields: Iterable[Field]) -> str:
    """The texts of all delimiters; those of patterns without their backslashes."""
    texts: list[str] = []
    for one in fields:
        for delimiter in (one.opener, one.closer):
            if delimiter is not None:
                pattern = delimiter.pattern.pattern.replace("\\", "")
                texts += delimiter.literals or (pattern,)
    return "\n".join(texts)
