"""What an answer has to say beside its structure: counts, reasons and texts that agree."""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tests.recorded.cases import Case

NATIVE_REASONS = frozenset({"length", "eos_token", "stop_sequence"})
OPENAI_REASONS = frozenset({"length", "stop", "tool_calls"})


def faults(case: Case, answer: Any) -> Iterator[str]:
    """Everything in one answer that contradicts the request or itself."""
    if case.is_native:
        yield from _of_native(case.parameters, answer)
    elif case.is_stream:
        yield from _of_stream(case, answer)
    else:
        yield from _of_whole(case, answer)


def _of_native(asked: Mapping[str, Any], answer: Mapping[str, Any]) -> Iterator[str]:
    text, details = answer["generated_text"], answer["details"]
    reason, count = details["finish_reason"], details["generated_tokens"]
    if count != len(details["tokens"]):
        yield f"generated_tokens is {count}, but there are {len(details['tokens'])} tokens"
    said = "".join(token["text"] for token in details["tokens"] if not token["special"])
    if not text.endswith(said):
        yield f"generated_text does not end in the tokens' text {said!r}"
    yield from _of_reason(reason, NATIVE_REASONS, count, asked.get("max_new_tokens"))
    if reason == "stop_sequence" and not text.endswith(tuple(asked["stop"])):
        yield f"no stop sequence ends {text!r}"
    if "truncate" in asked and len(details["prefill"]) > asked["truncate"]:
        yield f"{len(details['prefill'])} tokens of the prompt, truncated to {asked['truncate']}"
    is_json = asked.get("grammar", {}).get("type") == "json"
    if is_json and reason != "length":
        yield from _of_json(said)


def _of_whole(case: Case, answer: Mapping[str, Any]) -> Iterator[str]:
    choices, usage = answer["choices"], answer["usage"]
    prompts = case.body.get("prompt", "")
    num_prompts = len(prompts) if isinstance(prompts, list) else 1
    if [choice["index"] for choice in choices] != list(range(num_prompts)):
        yield f"choices {[choice['index'] for choice in choices]} for {num_prompts} prompts"
    if usage["total_tokens"] != usage["prompt_tokens"] + usage["completion_tokens"]:
        yield f"the sum is wrong: {usage}"
    count = usage["completion_tokens"] if len(choices) == 1 else None
    for choice in choices:
        reason = choice["finish_reason"]
        yield from _of_reason(reason, OPENAI_REASONS, count, case.body.get("max_tokens"))
        calls = choice.get("message", {}).get("tool_calls") or ()
        yield from _of_calls(case, calls, reason)
        if "response_format" in case.body and reason != "length":
            yield from _of_json(choice["message"]["content"])


def _of_stream(case: Case, events: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    if len({event["id"] for event in events}) != 1:
        yield "the id changes within a stream"
    reasons: dict[int, list[str]] = {}
    texts: dict[int, str] = {}
    calls: dict[int, dict[str, Any]] = {}
    for event in events:
        for choice in event["choices"]:
            index = choice["index"]
            reasons.setdefault(index, []).extend(filter(None, [choice["finish_reason"]]))
            delta = choice.get("delta", {})
            piece = delta.get("content") or choice.get("text") or ""
            texts[index] = texts.get(index, "") + piece
            for part in delta.get("tool_calls") or ():
                _grow(calls.setdefault(part["index"], {}), part)
    for index, given in reasons.items():
        if len(given) != 1:
            yield f"choice {index} has the finish reasons {given}"
        for reason in given:
            yield from _of_reason(reason, OPENAI_REASONS, None, None)
            yield from _of_calls(case, list(calls.values()), reason)
            if "response_format" in case.body and reason != "length":
                yield from _of_json(texts[index])


def _grow(call: dict[str, Any], part: Mapping[str, Any]) -> None:
    function = part["function"]
    name, pieces = function.get("name"), function.get("arguments") or ""
    grown = call.setdefault("function", {"name": "", "arguments": ""})
    grown["name"] += name or ""
    grown["arguments"] += pieces


def _of_calls(case: Case, calls: Sequence[Mapping[str, Any]], reason: str) -> Iterator[str]:
    if (reason == "tool_calls") > bool(calls):
        yield "tool_calls is the reason of an answer without any"
    choice = case.body.get("tool_choice")
    is_named = choice not in (None, "auto", "none", "required")
    if is_named and len(calls) != 1:
        yield f"{len(calls)} calls of a tool that was named"
    names = [tool["function"]["name"] for tool in case.body.get("tools", ())]
    for call in calls:
        if call["function"]["name"] not in names:
            yield f"{call['function']['name']!r} is none of the tools {names}"
        if reason == "tool_calls":
            yield from _of_json(call["function"]["arguments"])


def _of_reason(
    reason: str, known: frozenset[str], count: int | None, most: int | None
) -> Iterator[str]:
    if reason not in known:
        yield f"{reason!r} is none of the finish reasons {sorted(known)}"
    if count is None or most is None:
        return
    if count > most:
        yield f"{count} tokens of at most {most}"
    if (reason == "length") != (count == most) and count != most:
        yield f"the finish reason is {reason!r} after {count} of {most} tokens"


def _of_json(text: str) -> Iterator[str]:
    try:
        value = json.loads(text)
    except ValueError as error:
        yield f"{text!r} is no JSON: {error}"
        return
    if not isinstance(value, dict):
        yield f"{text!r} is no JSON object"
