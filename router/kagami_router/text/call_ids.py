"""Gives calls and their results ids that a template takes: some take one form of id only.

Clients send back ids of any form: of other servers, empty, all the same. A template of Mistral's
kind refuses all but nine letters and digits. One of Kimi's kind shows the model a call's id instead
of its name. The client never sees these ids.
"""

import enum
import hashlib
import itertools
import re
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Mapping, Sequence
from typing import Any

from kagami_router.text.templates.values import Arguments

Message = Mapping[str, Any]

_NUM_CHARACTERS = 9
_NINE = re.compile(rf"[A-Za-z0-9]{{{_NUM_CHARACTERS}}}")


class IdForm(enum.Enum):
    """Which ids of calls a template takes."""

    ANY = enum.auto()
    NINE = enum.auto()
    """Nine letters and digits"""
    NAMED = enum.auto()
    """`functions.NAME:NUMBER`; the number counts the calls of a conversation"""


_PROBE_NAME = "kagami_probe_name"
PROBE_IDS = ("kagami-probe-id", "kagamiid9")


def probe(call_id: str) -> tuple[Message, ...]:
    """What is rendered to learn a template's form: a call, and its result."""
    function = {"name": _PROBE_NAME, "arguments": Arguments("{}", {})}
    call = {"id": call_id, "type": "function", "function": function}
    return (
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "b", "tool_call_id": call_id},
    )


def form_of(prompts: Sequence[str | None]) -> IdForm:
    """The form, by the prompts of the probes with `PROBE_IDS`; None = refused."""
    foreign, nine = prompts
    if foreign is None:
        return IdForm.ANY if nine is None else IdForm.NINE
    # The id stands at the call and at its result, and the function's name nowhere.
    is_named = foreign.count(PROBE_IDS[0]) > 1 and _PROBE_NAME not in foreign
    return IdForm.NAMED if is_named else IdForm.ANY


def has_calls(messages: Sequence[Message]) -> bool:
    """Whether a message has calls, or is the result of one."""
    return any(message.get("tool_calls") or message.get("role") == "tool" for message in messages)


def with_ids(messages: Sequence[Message], form: IdForm) -> list[Message]:
    """The messages with ids of this form.

    What comes later does not change an earlier id: the prompt of the next turn begins with the
    prompt of this one, and is found in the cache.
    """
    ids = _Ids(form)
    changed = []
    for message in messages:
        if isinstance(calls := message.get("tool_calls"), list) and calls:
            message = {**message, "tool_calls": ids.of_calls(calls)}
        elif message.get("role") == "tool":
            message = {**message, "tool_call_id": ids.of_result(message)}
        changed.append(message)
    return changed


class _Ids:
    """The ids of one conversation: as sent -> as the template gets them."""

    def __init__(self, form: IdForm) -> None:
        self._source = _NamedIds() if form is IdForm.NAMED else _NineIds()
        self._last: dict[str, str] = {}
        # The calls of the last message that has some, without those that have their result.
        self._open: OrderedDict[str, str] = OrderedDict()  # new -> as sent
        self._by_sent: defaultdict[str, deque[str]] = defaultdict(deque)

    def of_calls(self, calls: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The calls of one message with their new ids."""
        self._open.clear()
        self._by_sent.clear()
        return [{**call, "id": self._of_call(call)} for call in calls]

    def _of_call(self, call: Mapping[str, Any]) -> str:
        sent = _text(call.get("id"))
        new = self._source.new(sent, call["function"].get("name"))
        self._last[sent] = new
        self._open[new] = sent
        self._by_sent[sent].append(new)
        return new

    def of_result(self, message: Message) -> str:
        """The new id of the call that a result answers.

        It is the first open call with the id that was sent; without an id, the first open call.
        """
        sent = _text(message.get("tool_call_id"))
        if waiting := self._by_sent.get(sent):
            new = waiting.popleft()
            del self._open[new]
            return new
        if not sent and self._open:
            new, of_call = self._open.popitem(last=False)
            self._by_sent[of_call].popleft()
            return new
        if sent not in self._last:
            self._last[sent] = self._source.new(sent, None)
        return self._last[sent]


class _NineIds:
    """Makes ids of nine letters and digits, each of them once."""

    def __init__(self) -> None:
        self._taken: set[str] = set()
        self._num_made: Counter[str] = Counter()

    def new(self, sent: str, name: object) -> str:
        """The id that was sent if it has the form and is new, else one that is made of it."""
        new = sent
        while not _NINE.fullmatch(new) or new in self._taken:
            seed = f"{self._num_made[sent]} {sent}"
            new = hashlib.blake2b(seed.encode(errors="replace")).hexdigest()[:_NUM_CHARACTERS]
            self._num_made[sent] += 1
        self._taken.add(new)
        return new


class _NamedIds:
    """Numbers the calls of a conversation."""

    def __init__(self) -> None:
        self._numbers = itertools.count()

    def new(self, sent: str, name: object) -> str:
        """The next number behind the name; a result without a call keeps the id that was sent."""
        return sent if name is None else f"functions.{name}:{next(self._numbers)}"


def _text(given: object) -> str:
    return "" if given is None else str(given)
