"""TGI's own tests, against us: each recorded request is sent, each answer has the recorded form."""

import json
import urllib.request
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import pytest
from tests.integration.conftest import Server, running
from tests.recorded.cases import WAITING_FOR_LORA, Case, all_cases
from tests.recorded.expected import expectations
from tests.recorded.meaning import faults
from tests.recorded.shapes import mismatches, stream_mismatches

pytestmark = pytest.mark.slow

CASES = all_cases()
TIMEOUT_S = 120
# A request without `max_tokens` may talk until here.
MAX_TOTAL_TOKENS = 1024
AT_ONCE = 8

Answers = Mapping[str, Future[list[Any]]]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("recorded")
    with running(folder, "--max-total-tokens", str(MAX_TOTAL_TOKENS)) as started:
        yield started


@pytest.fixture(scope="module")
def answers(server: Server) -> Iterator[Answers]:
    """All requests, some at once; each test waits for its own."""
    most_copies = max(case.copies for case in CASES)
    with (
        ThreadPoolExecutor(AT_ONCE) as cases,
        ThreadPoolExecutor(AT_ONCE * most_copies) as copies,
    ):

        def ask(case: Case) -> list[Any]:
            return list(copies.map(lambda _: _answer(server, case), range(case.copies)))

        yield {case.name: cases.submit(ask, case) for case in CASES}
        cases.shutdown(cancel_futures=True)


def _answer(server: Server, case: Case) -> Any:
    headers = {"content-type": "application/json"}
    request = urllib.request.Request(
        f"{server.url}{case.path}", json.dumps(case.body).encode(), headers
    )
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as response:
            text = response.read().decode()
    except urllib.error.HTTPError as error:
        raise AssertionError(f"{error.code}: {error.read().decode()}") from None
    if case.is_stream:
        return _events(text)
    answer = json.loads(text)
    if case.path == "/":
        (answer,) = answer
    return answer


def _events(text: str) -> list[Any]:
    *events, done, nothing = [event for event in text.split("\n\n") if not event.startswith(":")]
    assert (done, nothing) == ("data: [DONE]", "")
    return [json.loads(event.removeprefix("data: ")) for event in events]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_answer_has_the_recorded_form(answers: Answers, case: Case) -> None:
    given = answers[case.name].result(TIMEOUT_S)
    compare = stream_mismatches if case.is_stream else mismatches
    alternatives = expectations(case)
    if case.copies > 1:
        alternatives = alternatives[0]
        assert len(alternatives) == len(given)
    for answer in given:
        found = [list(compare(expected, answer)) for expected in alternatives]
        assert [] in found, (found, answer)
        assert list(faults(case, answer)) == []


def test_every_file_has_a_test_or_waits_for_lora() -> None:
    assert len(CASES) + len(WAITING_FOR_LORA) == 66
