"""Anthropic's client against a real server."""

import json
from typing import Any

import anthropic
import pytest
from pydantic import BaseModel
from tests.integration.conftest import Server

pytestmark = pytest.mark.slow
USER = {"role": "user", "content": "What is the capital of France? Answer in one word."}
ASK: dict[str, Any] = {"model": "tgi", "max_tokens": 12, "messages": [USER]}
GREEDY: dict[str, Any] = {"extra_body": {"temperature": 0}}
TOOL = {
    "name": "weather",
    "description": "Says how the weather is in a city",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}},
        "required": ["city"],
    },
}
WEATHER = {"role": "user", "content": "How is the weather in Paris?"}


@pytest.fixture
def client(bf16_server: Server) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=bf16_server.url, api_key="-", max_retries=0)


def test_an_answer_and_its_stream_are_the_same(client: anthropic.Anthropic) -> None:
    whole = client.messages.create(**ASK, **GREEDY)
    with client.messages.stream(**ASK, **GREEDY) as stream:
        streamed = stream.get_final_message()

    assert "Paris" in whole.content[0].text
    assert [block.text for block in streamed.content] == [block.text for block in whole.content]
    assert streamed.stop_reason == whole.stop_reason == "end_turn"
    assert streamed.usage.output_tokens == whole.usage.output_tokens


def test_the_prompt_is_counted_as_it_is_used(client: anthropic.Anthropic) -> None:
    counted = client.messages.count_tokens(model="tgi", messages=[USER], system="Be brief.")
    usage = client.messages.create(**ASK, system="Be brief.").usage

    assert counted.input_tokens == usage.input_tokens + (usage.cache_read_input_tokens or 0)


def test_a_second_call_finds_the_first_in_the_cache(client: anthropic.Anthropic) -> None:
    long = {"role": "user", "content": "One more word. " * 40}
    first = client.messages.create(model="tgi", max_tokens=1, messages=[long])
    second = client.messages.create(model="tgi", max_tokens=1, messages=[long])

    assert (second.usage.cache_read_input_tokens or 0) >= 64
    totals = [
        one.usage.input_tokens + (one.usage.cache_read_input_tokens or 0) for one in (first, second)
    ]
    assert totals[0] == totals[1]


def test_a_stop_sequence_is_cut_off_and_told(client: anthropic.Anthropic) -> None:
    begun = {"role": "assistant", "content": "1, 2, 3, 4, 5,"}
    count = {"role": "user", "content": "Count to twenty."}
    answer = client.messages.create(
        model="tgi", max_tokens=40, messages=[count, begun], stop_sequences=["!!", "9"], **GREEDY
    )

    assert answer.content[0].text.strip() == "6, 7, 8,"
    assert (answer.stop_reason, answer.stop_sequence) == ("stop_sequence", "9")


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "weather"}])
def test_a_tool_is_called_and_its_result_read(
    client: anthropic.Anthropic, choice: dict[str, Any]
) -> None:
    ask = {"model": "tgi", "max_tokens": 100, "tools": [TOOL]}
    one = choice | {"disable_parallel_tool_use": True}
    first = client.messages.create(**ask, messages=[WEATHER], tool_choice=one)
    (call,) = first.content
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "Sunny, 25 degrees"}
    second = client.messages.create(
        **ask,
        messages=[WEATHER, first.to_param(), {"role": "user", "content": [result]}],
        tool_choice={"type": "none"},
    )

    assert first.stop_reason == "tool_use"
    assert list(call.input) == ["city"]
    assert second.content[0].type == "text"


def test_a_streamed_call_is_the_json_of_its_input(client: anthropic.Anthropic) -> None:
    choice = {"type": "any", "disable_parallel_tool_use": True}
    with client.messages.stream(
        model="tgi", max_tokens=100, messages=[WEATHER], tools=[TOOL], tool_choice=choice
    ) as stream:
        pieces = [event.partial_json for event in stream if event.type == "input_json"]
        message = stream.get_final_message()

    assert len(pieces) > 1
    assert message.stop_reason == "tool_use"
    assert json.loads("".join(pieces)) == message.content[0].input


class Place(BaseModel):
    """What the model is held to."""

    city: str
    is_capital: bool


def test_an_answer_obeys_its_schema(client: anthropic.Anthropic) -> None:
    answer = client.messages.parse(
        model="tgi", max_tokens=200, messages=[USER], output_format=Place, **GREEDY
    )

    assert isinstance(answer.parsed_output, Place)
