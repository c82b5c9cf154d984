from typing import Any

import pytest
from tests.recorded.shapes import mismatches, stream_mismatches

TOKEN = {"id": 1, "text": "a", "logprob": -1.0}
FIRST = {"id": 1, "text": "a", "logprob": None}


@pytest.mark.parametrize(
    ("expected", "got"),
    [
        ({"id": "", "name": None}, {"id": "cmpl-1"}),
        ({"object": "list"}, {"object": "list", "usage": None}),
        ([FIRST, TOKEN], [FIRST, TOKEN, TOKEN]),
        ({"logprobs": None}, {"logprobs": None}),
    ],
    ids=["a client's null", "our null", "another length", "a required null"],
)
def test_the_same_structure(expected: Any, got: Any) -> None:
    assert list(mismatches(expected, got)) == []


@pytest.mark.parametrize(
    ("expected", "got"),
    [
        ({"id": ""}, {}),
        ({"id": ""}, {"id": 0}),
        ({"id": ""}, {"id": "", "more": 1}),
        ({"object": "list"}, {"object": "model"}),
        ({"logprobs": None}, {}),
        ({"usage": None}, {"usage": {}}),
        ([], [TOKEN]),
        ([FIRST, TOKEN], [TOKEN, TOKEN]),
        ([FIRST, TOKEN], [FIRST, FIRST]),
        (True, 1),
    ],
)
def test_another_structure(expected: Any, got: Any) -> None:
    assert list(mismatches(expected, got)) != []


def event(text: str, reason: str | None = None, index: int = 0) -> dict[str, Any]:
    return {"choices": [{"index": index, "text": text, "finish_reason": reason}]}


USAGE: dict[str, Any] = {"choices": [], "usage": {}}
STREAM = [event("a"), event("b"), event("c", "length"), USAGE]


@pytest.mark.parametrize("got", [STREAM, [event("x"), *STREAM], STREAM[1:], STREAM[2:]])
def test_the_same_stream(got: list[Any]) -> None:
    assert list(stream_mismatches(STREAM, got)) == []


@pytest.mark.parametrize(
    "got",
    [
        STREAM[:-1],
        [USAGE, *STREAM[:-1]],
        [*STREAM[:2], USAGE],
        [STREAM[2], *STREAM],
        [event("x", index=1), *STREAM],
    ],
    ids=["no usage", "usage first", "no end", "end first", "another choice"],
)
def test_another_stream(got: list[Any]) -> None:
    assert list(stream_mismatches(STREAM, got)) != []
