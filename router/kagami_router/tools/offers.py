"""The tools that a request offers, and the calls that its answer may make.

Pure: JSON values in, frozen values or a `ToolError` out. formats.py says how a model writes a call,
parser.py reads its text.
"""

import enum
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kagami_proto.errors import ToolError
from kagami_router.tools.json_schema import closed

MAX_TOOLS = 128  # OpenAI's
MAX_CALLS = 16  # in one answer
# OpenAI allows [a-zA-Z0-9_-]{1,64}. Names from MCP servers have dots and slashes, others have
# letters beyond ASCII.
NAME = r"[\w.:/-]{1,128}"
_NAME = re.compile(NAME)
_QUOTED = 80  # characters of a value that an error shows


@dataclass(frozen=True, slots=True)
class Tool:
    """One function that may be called."""

    name: str
    schema: Mapping[str, Any]
    """The schema of its arguments: an object, closed unless the schema says otherwise."""
    is_strict: bool
    """True: an unsupported keyword of the schema is an error; False: it is ignored."""
    definition: Mapping[str, Any]
    """OpenAI's JSON object for it, which chat templates read."""


class Mode(enum.Enum):
    """Whether an answer may or must call tools."""

    NONE = enum.auto()
    AUTO = enum.auto()
    REQUIRED = enum.auto()


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """What the client asked for; `names` None = any of the tools."""

    mode: Mode
    names: tuple[str, ...] | None = None
    max_calls: int = MAX_CALLS


AUTO = ToolChoice(Mode.AUTO)
NONE = ToolChoice(Mode.NONE)
REQUIRED = ToolChoice(Mode.REQUIRED)


@dataclass(frozen=True, slots=True)
class AllowedCalls:
    """The calls that one answer may make, at least one of them if `is_required`."""

    tools: tuple[Tool, ...]
    is_required: bool
    max_calls: int


def read_tools(
    given: Sequence[object], read: Callable[[str, object], Tool] | None = None
) -> tuple[Tool, ...]:
    """The tools of a request; raises `ToolError`.

    `read(place, value)` reads one of them; the default reads the form of OpenAI's chats.
    """
    read = read or _read_tool
    if len(given) > MAX_TOOLS:
        raise ToolError(
            f"`tools` must have at most {MAX_TOOLS} tools. Given: {len(given)}", field="tools"
        )
    tools: dict[str, Tool] = {}
    for index, one in enumerate(given):
        tool = read(f"tools[{index}]", one)
        if tool.name in tools:
            raise ToolError(
                f"`tools[{index}]` has a name that was given before: {tool.name}",
                field=f"tools[{index}]",
            )
        tools[tool.name] = tool
    return tuple(tools.values())


def _read_tool(place: str, given: object) -> Tool:
    """A tool in the form of OpenAI's chats; TGI's key `arguments` means `parameters`."""
    function = given.get("function") if isinstance(given, Mapping) else None
    if not isinstance(given, Mapping) or not isinstance(function, Mapping):
        raise ToolError(
            f'`{place}` must be {{"type":"function","function":{{"name":…}}}}', field=place
        )
    kind = given.get("type", "function")
    if kind != "function":
        raise ToolError(
            f"`{place}.type` must be `function`. Given: {_quote(kind)}", field=f"{place}.type"
        )
    function = dict(function)
    arguments = function.pop("arguments", None)
    if function.get("parameters") is None:
        function.pop("parameters", None)
        if arguments is not None:
            function["parameters"] = arguments
    return tool(
        f"{place}.function",
        {**given, "type": "function", "function": function},
        schema=function.get("parameters"),
    )


def tool(place: str, definition: Mapping[str, Any], *, schema: object) -> Tool:
    """The tool at `place` of the request; `schema` None = no arguments. Raises `ToolError`.

    `definition` has a `function` with at least `name`; `schema` is that of its arguments.
    """
    function = definition["function"]
    name = function.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise ToolError(
            f"`{place}.name` must have 1 to 128 letters, digits or any of `_-.:/`."
            f" Given: {_quote(name)}",
            field=f"{place}.name",
        )
    is_strict = function.get("strict") is True
    return Tool(name, _object_schema(f"{place}.parameters", schema), is_strict, definition)


def _object_schema(place: str, schema: object) -> Mapping[str, Any]:
    if schema is None:
        schema = {}
    if not isinstance(schema, Mapping):
        raise ToolError(f"`{place}` must be a JSON schema. Given: {_quote(schema)}", field=place)
    kind = schema.get("type", "object")
    if kind != "object":
        raise ToolError(
            f"`{place}` must be the schema of an object. Given: {_quote(kind)}", field=place
        )
    try:
        made = {"type": "object", **closed(schema)}
    except RecursionError as error:
        raise ToolError(f"`{place}` is nested too deeply", field=place) from error
    if not schema:
        made["additionalProperties"] = False  # a function without arguments
    return made


def read_choice(given: object) -> ToolChoice:
    """OpenAI's `tool_choice` or TGI's, a tool's name; None = auto. Raises `ToolError`."""
    if given is None:
        return AUTO
    if isinstance(given, str):
        return _MODES.get(given) or _this_one(given)
    kind = given.get("type", "function") if isinstance(given, Mapping) else None
    match given:
        case {"function": {"name": str(name)}} if kind == "function":
            return _this_one(name)
        case {"allowed_tools": {"mode": "auto" | "required" as mode, "tools": [*listed]}} if (
            kind == "allowed_tools"
        ):
            return ToolChoice(_MODES[mode].mode, tuple(_listed_name(one) for one in listed))
        case _:
            raise ToolError(
                "`tool_choice` must be `auto`, `none`, `required`, or"
                f' {{"type":"function","function":{{"name":…}}}}. Given: {_quote(given)}',
                field="tool_choice",
            )


def _this_one(name: str) -> ToolChoice:
    """A choice of one named tool: exactly one call, as with OpenAI and TGI."""
    return ToolChoice(Mode.REQUIRED, (name,), max_calls=1)


_MODES: Mapping[str, ToolChoice] = {"auto": AUTO, "none": NONE, "required": REQUIRED}


def _listed_name(given: object) -> str:
    match given:
        case {"function": {"name": str(name)}} | {"name": str(name)}:
            return name
        case _:
            raise ToolError(
                f"`tool_choice.allowed_tools.tools` has no such form: {_quote(given)}",
                field="tool_choice.allowed_tools.tools",
            )


def allowed_calls(
    tools: Sequence[Tool], choice: ToolChoice, *, is_parallel: bool
) -> AllowedCalls | None:
    """The calls that `choice` allows; None = no calls, and the prompt shows no tools."""
    if choice.mode is Mode.NONE:
        return None
    if not tools:
        if choice == AUTO:
            return None
        raise ToolError("`tool_choice` is only allowed when `tools` are given", field="tool_choice")
    chosen = tuple(tools)
    if choice.names is not None:
        by_name = {one.name: one for one in tools}
        for name in choice.names:
            if name not in by_name:
                raise ToolError(f"Tool with name {name[:_QUOTED]} not found", field="tool_choice")
        chosen = tuple(by_name[name] for name in dict.fromkeys(choice.names))
        if not chosen:
            raise ToolError(
                "`tool_choice.allowed_tools.tools` cannot be empty",
                field="tool_choice.allowed_tools.tools",
            )
    max_calls = choice.max_calls if is_parallel else 1
    return AllowedCalls(chosen, choice.mode is Mode.REQUIRED, max_calls)


def _quote(value: object) -> str:
    return repr(value)[:_QUOTED]
