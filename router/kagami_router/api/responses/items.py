"""Converts the items of /v1/responses to messages of a chat.

JSON values in, chat messages in OpenAI's form out, or an `InvalidRequest` that names the place.
"""

from collections.abc import Mapping
from typing import Any

from kagami_proto.errors import InvalidRequest, MalformedBody, ToolError
from kagami_router.api.answering.history import read_arguments, read_part, read_text
from kagami_router.api.responses.tools import INPUT, seen_name
from kagami_router.api.schemas.responses import ResponsesRequest
from kagami_router.text.templates.values import Arguments
from kagami_router.tools import offers
from kagami_router.tools.offers import ToolChoice

Message = dict[str, Any]

# Chat templates have no role `developer`: it becomes `system`.
_ROLES: Mapping[str, str] = {
    "user": "user",
    "assistant": "assistant",
    "system": "system",
    "developer": "system",
}
# The members of a message that has thoughts and nothing else yet.
_THOUGHTS_ALONE = {"role", "reasoning_content"}
_READ = (
    *(None, "message", "reasoning", "item_reference"),
    *("function_call", "custom_tool_call", "local_shell_call"),
    *("function_call_output", "custom_tool_call_output", "local_shell_call_output"),
)
_QUOTED = 80  # characters of a value that an error shows


def read_messages(body: ResponsesRequest) -> list[Message]:
    """The conversation: `instructions`, then the items of `input`."""
    if body.input is None:
        raise MalformedBody(
            "Failed to deserialize the JSON body into the target type: missing field `input`",
            field="input",
        )
    messages: list[Message] = []
    if body.instructions:
        messages.append({"role": "system", "content": body.instructions})
    if isinstance(body.input, str):
        return [*messages, {"role": "user", "content": body.input}]
    if not body.input:
        raise InvalidRequest("`input` cannot be empty", field="input")
    for index, item in enumerate(body.input):
        _add_item(messages, f"input[{index}]", item)
    if not messages:
        raise InvalidRequest("`input` has no message", field="input")
    for message in messages:
        message.setdefault("content", "")  # thoughts that nothing followed
    return messages


def _add_item(messages: list[Message], place: str, item: Mapping[str, Any]) -> None:
    match item.get("type"):
        case None | "message":
            _add_message(messages, place, item)
        case "function_call":
            arguments = read_arguments(f"{place}.arguments", item.get("arguments"))
            _add_call(messages, place, item, _name(place, item), arguments)
        case "custom_tool_call":
            given = {INPUT: read_text(place, item, "input")}
            arguments = read_arguments(f"{place}.input", given)
            _add_call(messages, place, item, _name(place, item), arguments)
        case "local_shell_call":
            arguments = read_arguments(f"{place}.action", item.get("action"))
            _add_call(messages, place, item, "local_shell", arguments)
        case "function_call_output" | "custom_tool_call_output" | "local_shell_call_output":
            messages.append(
                {
                    "role": "tool",
                    "tool_call_id": read_text(place, item, "call_id"),
                    "content": _content(f"{place}.output", item.get("output")),
                }
            )
        case "reasoning":
            _add_thoughts(messages, place, item)
        case "item_reference":
            raise InvalidRequest(
                f"`{place}` is an item_reference, and this server keeps no items: send the item",
                field=place,
            )
        case str():
            pass  # left out: see `left_out`
        case other:
            raise InvalidRequest(
                f"`{place}.type` must be a text. Given: {_quote(other)}", field=f"{place}.type"
            )


def left_out(body: ResponsesRequest) -> list[str]:
    """Place and type of the items that the model does not see: what other servers have done."""
    if not isinstance(body.input, list):
        return []
    kinds = [(index, item.get("type")) for index, item in enumerate(body.input)]
    return [f"input[{index}]: {kind}" for index, kind in kinds if kind not in _READ]


def _name(place: str, item: Mapping[str, Any]) -> str:
    return seen_name(read_text(place, item, "name"), item.get("namespace"))


def _add_message(messages: list[Message], place: str, item: Mapping[str, Any]) -> None:
    role = _ROLES.get(read_text(place, item, "role"))
    if role is None:
        raise InvalidRequest(
            f"`{place}.role` must be one of {', '.join(_ROLES)}. Given: {_quote(item['role'])}",
            field=f"{place}.role",
        )
    content = _content(f"{place}.content", item.get("content"))
    if role == "assistant" and messages and messages[-1].keys() == _THOUGHTS_ALONE:
        messages[-1]["content"] = content
        return
    messages.append({"role": role, "content": content})


def _add_thoughts(messages: list[Message], place: str, item: Mapping[str, Any]) -> None:
    """Add what the model thought before its next message or call; its text or its summary."""
    parts = item.get("content") or item.get("summary") or []
    if not isinstance(parts, list) or not all(isinstance(part, Mapping) for part in parts):
        raise MalformedBody(f"{place}.content: expected a list of parts", field=place)
    thoughts = "".join(read_text(f"{place}.content", part, "text") for part in parts)
    if thoughts:  # else it is encrypted, by another server
        messages.append({"role": "assistant", "reasoning_content": thoughts})


def _add_call(
    messages: list[Message], place: str, item: Mapping[str, Any], name: str, arguments: Arguments
) -> None:
    """Add a call to the assistant's message before it, or to a new message."""
    call = {
        "id": read_text(place, item, "call_id"),
        "type": "function",
        "function": {
            "name": name,
            "arguments": arguments,
        },
    }
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": None, "tool_calls": []})
    messages[-1].setdefault("content", None)
    messages[-1].setdefault("tool_calls", []).append(call)


def _content(place: str, content: object) -> str:
    """The text of a message or of a call's output."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise MalformedBody(f"{place}: expected a text or a list of parts", field=place)
    return "".join(read_part(f"{place}[{number}]", part) for number, part in enumerate(content))


def read_choice(given: object) -> ToolChoice:
    """`tool_choice`; None = auto. Raises `ToolError`."""
    match given:
        case None | "auto" | "none" | "required":
            return offers.read_choice(given)
        case {"type": "function" | "custom", "name": str(name)}:
            return offers.read_choice({"type": "function", "function": {"name": name}})
        case {"type": "allowed_tools"}:
            return offers.read_choice({"type": "allowed_tools", "allowed_tools": given})
        case _:
            raise ToolError(
                "`tool_choice` must be `auto`, `none`, `required`, or"
                f' {{"type":"function","name":…}}. Given: {_quote(given)}',
                field="tool_choice",
            )


def _quote(value: object) -> str:
    return repr(value)[:_QUOTED]
