"""Puts system messages where a template takes them: many take only one, the first.

Such templates refuse any other one, or leave it out without a word. Clients send several, and late
ones: coding agents say what has changed in the middle of a conversation.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

Message = Mapping[str, Any]

_SYSTEM, _USER = "system", "user"


class SystemRule(NamedTuple):
    """What a template does with system messages."""

    takes_several: bool
    """At the beginning"""
    takes_late: bool
    """Behind other messages"""


def _said(*roles: str) -> tuple[Message, ...]:
    return tuple(
        {"role": role, "content": f"kagami-probe-{number}-text"}
        for number, role in enumerate(roles)
    )


# What is rendered to learn the rule.
SEVERAL = _said(_SYSTEM, _SYSTEM, _USER)
LATE = _said(_SYSTEM, _USER, "assistant", _SYSTEM, _USER)


def are_shown(probe: Sequence[Message], prompt: str) -> bool:
    """Whether all system messages of a probe are in its prompt."""
    return all(one["content"] in prompt for one in probe if one["role"] == _SYSTEM)


def is_usual(messages: Sequence[Message]) -> bool:
    """Whether no message but the first is a system message."""
    return not any(message.get("role") == _SYSTEM for message in messages[1:])


def placed(messages: Sequence[Message], rule: SystemRule) -> list[Message]:
    """The messages as the template takes them.

    The first ones become one message. A late one becomes a part of the user's message before or
    behind it, else a message of the user's: what stands before it stays, and is found in the cache.
    """
    num_first = next(
        (at for at, message in enumerate(messages) if message.get("role") != _SYSTEM),
        len(messages),
    )
    first, rest = list(messages[:num_first]), messages[num_first:]
    if len(first) > 1 and not rule.takes_several:
        first = [_joined(first[0], first)]
    return first + (list(rest) if rule.takes_late else _folded(rest))


def _folded(messages: Sequence[Message]) -> list[Message]:
    folded: list[Message] = []
    waiting: list[Message] = []  # for the user's next message
    for message in messages:
        role = message.get("role")
        if role == _SYSTEM and not waiting and folded and folded[-1].get("role") == _USER:
            folded.append(_joined(last := folded.pop(), [last, message]))
        elif role == _SYSTEM:
            waiting.append(message)
        elif waiting and role == _USER:
            folded.append(_joined(message, [*waiting, message]))
            waiting = []
        else:
            folded += _as_user(waiting)
            folded.append(message)
            waiting = []
    return folded + _as_user(waiting)


def _as_user(messages: Sequence[Message]) -> list[Message]:
    return [{"role": _USER, "content": _text(messages)}] if messages else []


def _joined(message: Message, parts: Sequence[Message]) -> Message:
    """`message` with the texts of `parts`."""
    return {**message, "content": _text(parts)}


def _text(messages: Sequence[Message]) -> str:
    texts = []
    for message in messages:
        content = message.get("content") or ""
        texts.append(content if isinstance(content, str) else "".join(p["text"] for p in content))
    return "\n\n".join(text for text in texts if text)
