"""/v1/responses with the embedded model, through openai and langchain."""

import json
from typing import Any, Literal

import openai
import pytest
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, Field
from tests.integration.conftest import Server

pytestmark = pytest.mark.slow

MODEL = "kagami/SmolLM2-135M-Instruct"
QUESTION = "What is the capital of France?"
ASKED: dict[str, Any] = {
    "model": MODEL,
    "input": QUESTION,
    "max_output_tokens": 12,
    "temperature": 0,
}
WEATHER: Any = {
    "type": "function",
    "name": "weather",
    "description": "Says the weather",
    "parameters": {
        "type": "object",
        "properties": {"city": {"enum": ["Paris", "Rome"]}},
        "required": ["city"],
    },
}


class Capital(BaseModel):
    """Where a country is governed."""

    city: str = Field(max_length=12)
    continent: Literal["Europe", "Asia"]


@pytest.fixture
def server(bf16_server: Server) -> Server:
    """As it is served by default; no text here is compared with another batch's."""
    return bf16_server


@pytest.fixture
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0)


def test_a_stream_says_what_the_whole_answer_says(client: openai.OpenAI) -> None:
    whole = client.responses.create(**ASKED)
    with client.responses.stream(**ASKED) as stream:
        kinds = [event.type for event in stream]
        streamed = stream.get_final_response()

    assert "Paris" in whole.output_text
    assert streamed.output_text == whole.output_text
    assert whole.usage is not None
    assert kinds.count("response.output_text.delta") >= whole.usage.output_tokens - 1
    assert kinds[-1] == "response.completed"


def test_it_answers_as_the_chat_does(client: openai.OpenAI) -> None:
    chat = client.chat.completions.create(
        model=MODEL,
        messages=[
            {"role": "system", "content": "You are short."},
            {"role": "user", "content": QUESTION},
        ],
        max_tokens=12,
        temperature=0,
    )
    response = client.responses.create(**ASKED, instructions="You are short.")

    assert response.output_text == chat.choices[0].message.content
    assert response.usage is not None
    assert chat.usage is not None
    assert response.usage.input_tokens == chat.usage.prompt_tokens
    assert response.usage.output_tokens == chat.usage.completion_tokens


def test_a_cut_answer_is_incomplete(client: openai.OpenAI) -> None:
    response = client.responses.create(**ASKED | {"max_output_tokens": 2})

    assert response.status == "incomplete"
    assert response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"


@pytest.mark.parametrize("seed", range(4))
def test_structured_output_is_what_was_asked_for(client: openai.OpenAI, seed: int) -> None:
    settings: dict[str, Any] = {
        "model": MODEL,
        "input": QUESTION,
        "text_format": Capital,
        "temperature": 1,
        "extra_body": {"seed": seed},
    }
    whole = client.responses.parse(**settings)
    with client.responses.stream(**settings) as stream:
        streamed = stream.get_final_response()

    assert isinstance(whole.output_parsed, Capital)
    assert streamed.output_parsed == whole.output_parsed


def test_a_required_call_is_answered_after_its_result(client: openai.OpenAI) -> None:
    items: list[Any] = [{"role": "user", "content": "What is the weather in Paris?"}]
    first = client.responses.create(
        model=MODEL, input=items, tools=[WEATHER], tool_choice="required", parallel_tool_calls=False
    )
    (call,) = first.output
    assert call.type == "function_call"
    assert json.loads(call.arguments)["city"] in ("Paris", "Rome")

    items += first.output
    items.append({"type": "function_call_output", "call_id": call.call_id, "output": "It is hot."})
    second = client.responses.create(
        model=MODEL, input=items, tools=[WEATHER], tool_choice="none", max_output_tokens=20
    )
    assert second.output_text


def test_arguments_of_a_call_stream_in_pieces(client: openai.OpenAI) -> None:
    with client.responses.stream(
        model=MODEL, input="Weather in Rome?", tools=[WEATHER], tool_choice="required"
    ) as stream:
        pieces = [e.delta for e in stream if e.type == "response.function_call_arguments.delta"]
        final = stream.get_final_response()
    calls = [item for item in final.output if item.type == "function_call"]

    assert len(pieces) > len(calls) > 0
    assert "".join(pieces) == "".join(call.arguments for call in calls)


def test_logprobs_stand_by_their_tokens(client: openai.OpenAI) -> None:
    response = client.responses.create(
        **ASKED, include=["message.output_text.logprobs"], top_logprobs=2
    )
    (message,) = response.output
    assert message.type == "message"
    (part,) = message.content
    assert part.type == "output_text"
    assert part.logprobs is not None

    assert "".join(entry.token for entry in part.logprobs) == part.text
    assert all(entry.top_logprobs[0].token == entry.token for entry in part.logprobs)


def test_langchain_asks_by_responses(server: Server) -> None:
    chat = ChatOpenAI(
        base_url=f"{server.url}/v1",
        api_key="-",
        model=MODEL,
        temperature=0,
        max_tokens=12,
        use_responses_api=True,
    )
    whole = chat.invoke(QUESTION)
    streamed = "".join(chunk.text for chunk in chat.stream(QUESTION))
    capital = chat.model_copy(update={"max_tokens": 60}).with_structured_output(Capital)

    assert "Paris" in whole.text
    assert streamed == whole.text
    assert isinstance(capital.invoke(QUESTION), Capital)
