"""Converts the tools of /v1/responses to those of a chat.

Functions are offered as they are, alone or in a namespace. A custom tool, which takes one text, is
offered as a function with one argument. Tools that OpenAI runs on its own servers are left out.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

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

    name: str
    is_custom: bool
    namespace: str | UnsetType = UNSET


@dataclass(frozen=True, slots=True)
class Offered:
    """The tools that the model gets."""

    tools: tuple[Tool, ...]
    origins: Mapping[str, Origin]
    """Of those that are no plain functions, by the name that the model sees"""
    left_out: tuple[str, ...]
    """Place and type of those that it does not get"""


class _Placed(NamedTuple):
    place: str
    given: Mapping[str, Any]
    namespace: str | UnsetType


def read_tools(given: Sequence[object]) -> Offered:
    """The tools of a request; raises `ToolError` for those that have no form at all."""
    placed = [inner for index, one in enumerate(given) for inner in _flat(f"tools[{index}]", one)]
    offered: list[_Placed] = []
    origins: dict[str, Origin] = {}
    left_out: list[str] = []
    for one in placed:
        kind, name = one.given["type"], one.given.get("name")
        if kind not in ("function", "custom"):
            left_out.append(f"{one.place}: {kind}")
            continue
        offered.append(one)
        is_plain = kind == "function" and one.namespace is UNSET
        if not is_plain and isinstance(name, str):
            seen = seen_name(name, one.namespace)
            origins[seen] = Origin(name, kind == "custom", one.namespace)
    places = iter(offered)
    tools = offers.read_tools([one.given for one in offered], lambda _, one: _tool(next(places)))
    return Offered(tools, origins, tuple(left_out))


def seen_name(name: str, namespace: object) -> str:
    """The name that the model sees: namespaces may have functions of the same name."""
    return f"{namespace}__{name}" if isinstance(namespace, str) else name


def _flat(place: str, given: object, namespace: str | UnsetType = UNSET) -> Iterator[_Placed]:
    """A tool, or those of a namespace."""
    kind = given.get("type") if isinstance(given, Mapping) else None
    if not isinstance(given, Mapping) or not isinstance(kind, str):
        raise ToolError(
            f'`{place}` must be {{"type":"function","name":…,"parameters":…}}', field=place
        )
    if kind != "namespace" or namespace is not UNSET:
        yield _Placed(place, given, namespace)
        return
    name, tools = given.get("name"), given.get("tools")
    if not isinstance(name, str) or not isinstance(tools, list):
        raise ToolError(f"`{place}` must have a `name` and a list of `tools`", field=place)
    for number, one in enumerate(tools):
        yield from _flat(f"{place}.tools[{number}]", one, name)


def _tool(placed: _Placed) -> Tool:
    place, given, namespace = placed
    leave = ("type", "format")  # a custom tool's grammar is not held
    function = {k: value for k, value in given.items() if k not in leave and value is not None}
    if isinstance(name := given.get("name"), str):
        function["name"] = seen_name(name, namespace)
    if given["type"] == "custom":
        function["parameters"] = _CUSTOM_SCHEMA
    return offers.tool(
        place, {"type": "function", "function": function}, schema=function.get("parameters")
    )


def input_of(arguments: str) -> str:
    """The text of a custom call; arguments that were cut count as they are."""
    try:
        text = msgspec.json.decode(arguments, type=dict[str, Any])[INPUT]
    except (msgspec.MsgspecError, KeyError, RecursionError):
        return arguments
    return text if isinstance(text, str) else arguments
