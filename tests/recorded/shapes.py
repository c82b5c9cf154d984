"""Compares two pieces of JSON by structure: names, types, nulls, the order of a stream's events.

The left side is what we expect, written back by a client that adds null keys: its null may be
absent on the right, and only the nulls of `REQUIRED_NULLS` have to stand there.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

# Texts that are compared as they are; all others are the model's business.
EXACT = frozenset({"object", "role", "type"})
# Servers write these nulls, not only clients.
REQUIRED_NULLS = frozenset({"logprobs", "seed"})
# What we say and TGI did not.
ADDITIONS: Mapping[str, str] = {
    "prompt_tokens_details": "OpenAI's usage tells how many tokens of the prompt were cached",
}


def mismatches(expected: Any, got: Any, place: str = "$") -> Iterator[str]:
    """Every place where `got` has another structure than `expected`."""
    if type(expected) is not type(got):
        yield f"{place}: expected {_name(expected)}, got {_name(got)}"
    elif isinstance(expected, dict):
        yield from _of_objects(expected, got, place)
    elif isinstance(expected, list):
        yield from _of_lists(expected, got, place)
    elif place.rpartition(".")[2] in EXACT and expected != got:
        yield f"{place}: expected {expected!r}, got {got!r}"


def stream_mismatches(expected: Sequence[Any], got: Sequence[Any]) -> Iterator[str]:
    """The same of two streams: for each choice the same phases in the same order.

    A phase is a run of events of one structure; it may have another length, and one between the
    first and the last may be missing.
    """
    wanted, given = _by_choice(expected), _by_choice(got)
    if wanted.keys() != given.keys():
        yield f"$: expected events of the choices {list(wanted)}, got {list(given)}"
        return
    if None in given and got[-len(given[None]) :] != given[None]:
        yield "$: the events of no choice are not the last"
    for choice, events in given.items():
        yield from _of_phases(_phases(wanted[choice]), events, f"$[{choice}]")


def _of_objects(expected: dict[str, Any], got: dict[str, Any], place: str) -> Iterator[str]:
    for key, value in expected.items():
        if key in ADDITIONS:
            continue
        if key in got:
            yield from mismatches(value, got[key], f"{place}.{key}")
        elif value is not None or key in REQUIRED_NULLS:
            yield f"{place}.{key}: expected {_name(value)}, got no such key"
    for key in got.keys() - expected.keys() - ADDITIONS.keys():
        if got[key] is not None:
            yield f"{place}.{key}: got {_name(got[key])}, expected no such key"


def _of_lists(expected: list[Any], got: list[Any], place: str) -> Iterator[str]:
    """First against first, which may be special; each other against any of the others."""
    if bool(expected) != bool(got):
        yield f"{place}: expected {len(expected)} elements, got {len(got)}"
    elif expected:
        yield from mismatches(expected[0], got[0], f"{place}[0]")
        for index, element in enumerate(got[1:], 1):
            kinds = expected[1:] or expected
            yield from _least(kinds, element, f"{place}[{index}]")


def _least(kinds: Iterable[Any], element: Any, place: str) -> list[str]:
    """The mismatches with the most similar of some kinds."""
    return min((list(mismatches(kind, element, place)) for kind in kinds), key=len)


def _by_choice(events: Sequence[Any]) -> dict[int | None, list[Any]]:
    """The events of each choice; those of none, which tell usage, stand under None."""
    result: dict[int | None, list[Any]] = {}
    for event in events:
        choice = event["choices"][0]["index"] if event["choices"] else None
        result.setdefault(choice, []).append(event)
    return result


def _phases(events: Sequence[Any]) -> list[Any]:
    phases = [events[0]]
    for event in events[1:]:
        if list(mismatches(phases[-1], event)) or list(mismatches(event, phases[-1])):
            phases.append(event)
    return phases


def _of_phases(phases: Sequence[Any], events: Sequence[Any], place: str) -> Iterator[str]:
    phase = 0
    for number, event in enumerate(events):
        here = f"{place}[{number}]"
        first = range(1) if len(events) > 1 else (0, len(phases) - 1)
        reachable = range(phase, len(phases)) if number else first
        found = {later: list(mismatches(phases[later], event, here)) for later in reachable}
        fitting = [later for later, faults in found.items() if not faults]
        if not fitting:
            yield from min(found.values(), key=len)
            return
        phase = fitting[0]
    if phase != len(phases) - 1:
        yield f"{place}: the stream ended in phase {phase + 1} of {len(phases)}"


def _name(value: Any) -> str:
    return "null" if value is None else type(value).__name__
