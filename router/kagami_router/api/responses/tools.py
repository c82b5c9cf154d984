"""Converts the tools of /v1/responses to those of a chat.

Functions are offered as they are, alone or in a namespace. A custom tool, which takes one text, is
offered as a function with one argument. Tools that OpenAI runs on its own servers are left out.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec
from msgspec import UNSET, UnsetType

from kagami_proto.errors import ToolError
from kagami_router.tools import offers
from kagami_router.tools.offers import Tool

INPUT = "input"
"""The one argument of a custom tool"""
_CUSTOM_SCHEMA: Mapping[str, Any] = {
    "type": "object",
    "properties": {INPUT: {"type": "string"}},
    "required": [INPUT],
}


@dataclass(frozen=True, slots=True)
class Origin:
    """What a function was in the request."""

    is_custom: bool = False
    namespace: str | UnsetType = UNSET


PLAIN = Origin()


@dataclass(frozen=True, slots=True)
class Offered:
    """The tools that the model gets."""

    tools: tuple[Tool, ...]
    origins: Mapping[str, Origin]
    """Of those that are no plain functions, by name"""
    left_out: tuple[str, ...]
    """The types of those that it does not get"""


def read_tools(given: Sequence[object]) -> Offered:
    """The tools of a request; raises `ToolError` for those that have no form at all."""
    placed: list[tuple[str, Mapping[str, Any]]] = []
    origins: dict[str, Origin] = {}
    left_out: list[str] = []
    for index, one in enumerate(given):
        _add(f"tools[{index}]", one, PLAIN, placed, origins, left_out)
    places = iter(place for place, _ in placed)
    tools = offers.read_tools(
        [one for _, one in placed], lambda _, one: _function(next(places), one)
    )
    return Offered(tools, origins, tuple(left_out))


def _add(
    place: str,
    given: object,
    origin: Origin,
    placed: list[tuple[str, Mapping[str, Any]]],
    origins: dict[str, Origin],
    left_out: list[str],
) -> None:
    kind = given.get("type") if isinstance(given, Mapping) else None
    if not isinstance(given, Mapping) or not isinstance(kind, str):
        raise ToolError(
            f'`{place}` must be {{"type":"function","name":…,"parameters":…}}', field=place
        )
    if kind == "namespace" and origin is PLAIN:
        name, inner = given.get("name"), given.get("tools")
        if not isinstance(name, str) or not isinstance(inner, list):
            raise ToolError(f"`{place}` must have a `name` and a list of `tools`", field=place)
        for number, one in enumerate(inner):
            within = Origin(namespace=name)
            _add(f"{place}.tools[{number}]", one, within, placed, origins, left_out)
    elif kind == "function":
        placed.append((place, given))
    elif kind == "custom":
        placed.append((place, {**given, "parameters": _CUSTOM_SCHEMA}))
        origin = Origin(is_custom=True, namespace=origin.namespace)
    else:
        left_out.append(f"{place}: {kind}")
    if origin is not PLAIN and isinstance(name := given.get("name"), str):
        origins[name] = origin


def _function(place: str, given: object) -> Tool:
    assert isinstance(given, Mapping)
    leave = ("type", "format")  # a custom tool's grammar is not held
    function = {k: value for k, value in given.items() if k not in leave and value is not None}
    return offers.tool(
        place, {"type": "function", "function": function}, schema=given.get("parameters")
    )


def input_of(arguments: str) -> str:
    """The text of a custom call; arguments that were cut count as they are."""
    try:
        return str(msgspec.json.decode(arguments, type=dict[str, str])[INPUT])
    except (msgspec.MsgspecError, KeyError, RecursionError):
        return arguments
