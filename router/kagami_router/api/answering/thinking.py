"""What clients say about reasoning, in the words that chat templates read."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

Message = Mapping[str, Any]

# The names under which clients send back what a model has thought, and templates read it.
_NAMES = ("reasoning_content", "reasoning", "thinking")
_OFF = "none"


def variables(effort: str | None = None, *, is_on: bool | None = None) -> dict[str, Any]:
    """The template's variables; None = not given.

    Templates read `reasoning_effort` (gpt-oss), `enable_thinking` (Qwen 3, GLM, SmolLM3) or
    `thinking` (DeepSeek V3.1, Granite, Kimi). An effort switches thinking on, `none` off.
    """
    made: dict[str, Any] = {} if effort is None else {"reasoning_effort": effort}
    if is_on is None and effort is not None:
        is_on = effort != _OFF
    return made if is_on is None else made | {"enable_thinking": is_on, "thinking": is_on}


def is_said(message: Message) -> bool:
    """Whether an assistant's message has thoughts."""
    return message.get("role") == "assistant" and bool(message.keys() & set(_NAMES))


def with_thoughts(messages: Sequence[Message], source: str) -> list[Message]:
    """The messages with thoughts under the names that the template reads, and under no other."""
    read = tuple(name for name in _NAMES if re.search(rf"\b{name}\b", source))
    return [_with_thoughts(message, read) for message in messages]


def _with_thoughts(message: Message, read: Sequence[str]) -> Message:
    if not is_said(message):
        return message
    texts = (message.get(name) for name in _NAMES)
    thoughts = next((text for text in texts if isinstance(text, str) and text), None)
    rest = {key: value for key, value in message.items() if key not in _NAMES}
    return rest if thoughts is None else rest | dict.fromkeys(read, thoughts)
