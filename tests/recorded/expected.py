"""What we expect in place of each recorded answer: the recording, but for the changes below.

Every difference between TGI's answers and ours has one row with its reason.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.recorded.cases import Case, recorded

_TOOLS = "3.3/test_tools_llama/test_flash_llama_grammar_tools"
CALL, CALL_STREAM = f"{_TOOLS}_choice_nostream", f"{_TOOLS}_choice_stream"
TEXT, TEXT_STREAM = (
    f"{_TOOLS}_insufficient_information_nostream",
    f"{_TOOLS}_insufficient_information_stream",
)
_MAX_CALLS = 8  # more do not fit into the tokens that are asked for
_USAGE = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}


@dataclass(frozen=True)
class Change:
    """One difference: for which recordings, why, and what is expected instead."""

    reason: str
    applies: Callable[[Case], bool]
    apply: Callable[[Any], Any]


def expectations(case: Case) -> list[Any]:
    """The recording as we would answer it; several where the model may choose."""
    choices = [recorded(name) for name in _instead(case)] or [copy.deepcopy(case.recorded)]
    for change in CHANGES:
        if change.applies(case):
            choices = [change.apply(choice) for choice in choices]
    return choices


def _instead(case: Case) -> list[str]:
    """The recordings that replace this one: no other server answers tools as TGI did.

    With `auto` the model chooses between text and a call. TGI 2.0 always called a tool, one of its
    own if there was no other. TGI 3.3 sent no event at all when a call was cut early. The test of
    2.0 recorded the last event only.
    """
    if not case.body.get("tools") or case.body.get("tool_choice") == "none":
        return []
    call, text = (CALL_STREAM, TEXT_STREAM) if case.is_stream else (CALL, TEXT)
    return [call, text] if case.body.get("tool_choice", "auto") == "auto" else [call]


def _events(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _says_chat(value: Any) -> Any:
    for event in _events(value):
        event["object"] = "chat.completion"
    return value


def _with_usage_at_the_end(events: list[Any]) -> list[Any]:
    last = {event["choices"][0]["index"]: event for event in events}
    for event in last.values():
        event["choices"][0]["finish_reason"] = "length"
        event["usage"] = _USAGE
    return events


def _null_until_the_end(events: list[Any]) -> list[Any]:
    for event in events:
        choice = event["choices"][0]
        choice["finish_reason"] = choice["finish_reason"] or None
    return events


def _with_prefill(value: Any) -> Any:
    token = {"id": 1, "text": "a"}
    prefill = [{**token, "logprob": None}, {**token, "logprob": -1.0}]
    for answer in _events(value):
        answer["details"]["prefill"] = prefill
    return value


def _role_once(events: list[Any]) -> list[Any]:
    for event in events[1:]:
        for choice in event["choices"]:
            choice["delta"]["role"] = None
    return events


def _call_as_openai(events: list[Any]) -> list[Any]:
    """Each call is its name and id, then its arguments. An empty delta with the reason ends all."""
    if not events[0]["choices"][0]["delta"]["tool_calls"]:
        return events
    for event in events[1:]:
        for call in event["choices"][0]["delta"]["tool_calls"]:
            call |= {"id": None, "type": None}
    another, end = copy.deepcopy(events[0]), copy.deepcopy(events[-1])
    another["choices"][0]["delta"]["role"] = None
    end["choices"][0] |= {"delta": {}, "finish_reason": "tool_calls"}
    return [*events, *[another, *events[1:]] * (_MAX_CALLS - 1), end]


CHANGES: tuple[Change, ...] = (
    Change(
        "2.0 called chat answers `text_completion`",
        lambda case: case.version == "2.0" and case.is_chat and not case.body.get("tools"),
        _says_chat,
    ),
    Change(
        "2.0 told neither reason nor usage at the end of a completion's stream, 3.3 does",
        lambda case: case.version == "2.0" and _is_completion_stream(case),
        _with_usage_at_the_end,
    ),
    Change(
        "OpenAI's finish_reason is null until the end, TGI's an empty text",
        lambda case: _is_completion_stream(case),
        _null_until_the_end,
    ),
    Change(
        "3.3 left `prefill` empty unless an operator switched it on; asked for, it is there",
        lambda case: bool(case.parameters.get("decoder_input_details")),
        _with_prefill,
    ),
    Change(
        "OpenAI's streams give the role in the first delta, TGI's in each",
        lambda case: case.is_chat and case.is_stream,
        _role_once,
    ),
    Change(
        "TGI repeated id and type in each piece of a call, never made a second call, and"
        " gave its stream no finish_reason",
        lambda case: bool(case.body.get("tools")) and case.is_stream,
        _call_as_openai,
    ),
)


def _is_completion_stream(case: Case) -> bool:
    return case.path == "/v1/completions" and case.is_stream
