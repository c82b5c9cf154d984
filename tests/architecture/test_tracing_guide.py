"""deploy/tracing.md says what the code exports, and its pictures show what was exported."""

import json
import re
from pathlib import Path

import pytest
from tests.benchmarks.waterfall import draw
from tests.fakes.span_names import names_of

from kagami_proto.span_names import SEMCONV_VERSION, EventName, Key, OtherServersKey, SpanName
from kagami_router.scheduler.sequence import WaitReason

DEPLOY = Path(__file__).parents[2] / "deploy"
GUIDE = (DEPLOY / "tracing.md").read_text()
STORIES = {
    "queued": "Slow because queued",
    "long-prompt": "Slow because of a long prompt in the batch",
    "preempted": "Slow because of preemption",
}


def first_column(heading: str) -> set[str]:
    """The names in the table whose header begins so."""
    table = GUIDE.split(f"\n| {heading} |", 1)[1].split("\n\n", 1)[0]
    return set(re.findall(r"^\| `([^`]+)`", table, re.MULTILINE))


def test_every_span_is_explained() -> None:
    assert first_column("span") == names_of(SpanName) | {"METHOD route"}


def test_every_attribute_is_explained() -> None:
    assert first_column("attribute") == names_of(Key)


def test_every_attribute_of_other_servers_is_explained() -> None:
    assert first_column("attribute elsewhere") == names_of(OtherServersKey)


def test_every_event_is_explained() -> None:
    assert first_column("event") == names_of(EventName)


def test_every_reason_to_wait_is_explained() -> None:
    assert first_column("reason") == set(WaitReason)


def test_the_version_of_the_conventions_is_stated() -> None:
    assert f"semantic conventions, version {SEMCONV_VERSION}" in GUIDE


@pytest.mark.parametrize(("name", "title"), STORIES.items())
def test_a_storys_picture_is_made_of_its_spans(name: str, title: str) -> None:
    spans = json.loads((DEPLOY / "tracing" / f"{name}.json").read_text())
    assert (DEPLOY / "tracing" / f"{name}.svg").read_text() == draw(title, spans)


@pytest.mark.parametrize("name", STORIES)
def test_a_story_is_one_trace_of_known_names(name: str) -> None:
    spans = json.loads((DEPLOY / "tracing" / f"{name}.json").read_text())
    assert len({span["trace_id"] for span in spans}) == 1
    assert {span["name"] for span in spans} <= names_of(SpanName) | {"POST /generate"}
    assert {key for span in spans for key in span["attributes"]} <= names_of(Key)


def test_the_stories_show_what_they_tell() -> None:
    told = {name: json.loads((DEPLOY / "tracing" / f"{name}.json").read_text()) for name in STORIES}
    (queue,) = [span for span in told["queued"] if span["name"] == "queue"]
    assert queue["attributes"]["kagami.queue.reason"] == "batch_size"
    (decode,) = [span for span in told["long-prompt"] if span["name"] == "decode"]
    (slowest,) = [event for event in decode["events"] if event["name"] == "slowest_step"]
    assert slowest["attributes"]["kagami.step.prefill_tokens"] == 3001
    decodes = [span for span in told["preempted"] if span["name"] == "decode"]
    assert "preempted" in {event["name"] for event in decodes[0]["events"]}
