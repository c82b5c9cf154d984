"""More clients: text-generation, langchain; every parameter that hub has."""

import asyncio
import inspect
import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import openai
import pytest
import text_generation
from huggingface_hub import InferenceClient
from pydantic import BaseModel
from tests.integration.conftest import Server

pytestmark = [
    pytest.mark.slow,
    # Clients that are older than the libraries they stand on.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
PROMPT = "The capital of France is"
MESSAGES = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]
PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 20}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}

# ---------------------------------------------------------------------- huggingface_hub

# What `text_generation` of hub 2.4 can be given; one test sends them all.
EVERY_PARAMETER: dict[str, Any] = {
    "best_of": 2,
    "decoder_input_details": True,
    "details": True,
    "do_sample": True,
    "frequency_penalty": 0.5,
    "grammar": {"type": "regex", "value": "[a-z ]{1,20}"},
    "max_new_tokens": 8,
    "repetition_penalty": 1.1,
    "return_full_text": False,
    "stop": ["\n"],
    "temperature": 0.9,
    "top_k": 40,
    "top_n_tokens": 2,
    "top_p": 0.95,
    "truncate": 4,
    "typical_p": 0.95,
    "watermark": True,
}
# Refused by name until LoRA comes; excludes best_of; makes a stream; is `stop`'s old name.
NOT_WITH_THEM = {"adapter_id", "seed", "stream", "stop_sequences"}


def test_hub_text_generation_with_every_parameter(server: Server) -> None:
    known = set(inspect.signature(InferenceClient.text_generation).parameters)
    assert known - {"self", "prompt", "model"} - NOT_WITH_THEM == set(EVERY_PARAMETER)

    answer = InferenceClient(server.url).text_generation(PROMPT, **EVERY_PARAMETER)

    assert answer.details.seed is not None
    assert len(answer.details.prefill) == 4
    assert answer.details.prefill[0].logprob is None
    assert all(len(top) >= 2 for top in answer.details.top_tokens)
    assert len(answer.details.best_of_sequences) == 1


def test_hub_streams_with_a_seed_and_details(server: Server) -> None:
    def once() -> tuple[str, Any]:
        client = InferenceClient(server.url)
        *_, last = client.text_generation(
            PROMPT, max_new_tokens=6, seed=7, temperature=1.0, stream=True, details=True
        )
        return last.generated_text, last.details.seed

    assert once() == once()


def test_hub_chat_with_a_schema(server: Server) -> None:
    answer = InferenceClient(base_url=server.url).chat_completion(
        [{"role": "user", "content": "Make up a person."}],
        max_tokens=80,
        response_format={"type": "json_schema", "json_schema": {"name": "p", "schema": PERSON}},
        logprobs=True,
        top_logprobs=2,
        stop=["}\n"],
        seed=3,
    )
    choice = answer.choices[0]
    jsonschema.validate(json.loads(choice.message.content or ""), PERSON)
    assert choice.logprobs is not None
    assert len(choice.logprobs.content[0].top_logprobs) == 2


# ---------------------------------------------------------------------- openai


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0) as made:
        yield made


def test_openai_parses_into_a_class(client: openai.OpenAI) -> None:
    class Person(BaseModel):
        name: str
        age: int

    answer = client.chat.completions.parse(
        model="tgi",
        messages=[{"role": "user", "content": "Make up a person with a short name."}],
        response_format=Person,
        max_tokens=120,
        temperature=0,
    )
    assert isinstance(answer.choices[0].message.parsed, Person)


def test_openai_stream_helper_builds_the_answer(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(
        model="tgi", messages=MESSAGES, max_tokens=12, temperature=0
    ) as stream:
        text = "".join(event.delta for event in stream if event.type == "content.delta")
        final = stream.get_final_completion()
    assert "Paris" in text
    assert final.choices[0].message.content == text


def test_openai_finds_the_model(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert client.models.retrieve(model.id) == model
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("another")


# ---------------------------------------------------------------------- text-generation


def test_text_generation_both_ways(server: Server) -> None:
    client = text_generation.Client(server.url)
    whole = client.generate(PROMPT, max_new_tokens=4, decoder_input_details=True)
    events = list(client.generate_stream(PROMPT, max_new_tokens=4))

    assert whole.generated_text.startswith(" Paris")
    assert "".join(event.token.text for event in events) == whole.generated_text
    assert events[-1].generated_text == whole.generated_text
    assert whole.details.generated_tokens == 4
    assert len(whole.details.prefill) > 4


async def test_text_generation_async_and_its_errors(server: Server) -> None:
    client = text_generation.AsyncClient(server.url)
    answer = await client.generate(PROMPT, max_new_tokens=2, best_of=2, do_sample=True)
    assert answer.details.best_of_sequences is not None
    # An error of the server's, not of the client's own checks.
    with pytest.raises(text_generation.errors.ValidationError, match="max_new_tokens"):
        await client.generate(PROMPT, max_new_tokens=1_000_000)


def test_text_generation_chat(server: Server) -> None:
    answer = text_generation.Client(server.url).chat(
        [text_generation.types.Message(role="user", content="Say hi.")], max_tokens=5
    )
    assert answer.choices[0].message.content


# ---------------------------------------------------------------------- langchain


def test_langchain_huggingface_endpoint(server: Server) -> None:
    from langchain_huggingface import HuggingFaceEndpoint

    endpoint = HuggingFaceEndpoint(
        endpoint_url=server.url, max_new_tokens=8, do_sample=False, temperature=0.01
    )
    whole = endpoint.invoke(PROMPT)
    streamed = "".join(endpoint.stream(PROMPT))
    assert "Paris" in whole
    assert "Paris" in streamed
    assert endpoint.bind(stop=["."]).invoke(PROMPT).strip().rstrip(".") == "Paris"


def test_langchain_huggingface_chat(server: Server) -> None:
    from langchain_huggingface import ChatHuggingFace, HuggingFaceEndpoint

    chat = ChatHuggingFace(
        llm=HuggingFaceEndpoint(endpoint_url=server.url, max_new_tokens=12), model_id="tgi"
    )
    answer = chat.invoke([("user", MESSAGES[0]["content"])], temperature=0)
    assert "Paris" in str(answer.content)
    assert answer.usage_metadata is not None


def test_langchain_openai_completions(server: Server) -> None:
    from langchain_openai import OpenAI

    llm = OpenAI(base_url=f"{server.url}/v1", api_key="-", model="tgi", max_tokens=4, temperature=0)
    assert llm.invoke(PROMPT).startswith(" Paris")


def test_langchain_openai_structured_output(server: Server) -> None:
    from langchain_openai import ChatOpenAI

    chat = ChatOpenAI(
        base_url=f"{server.url}/v1", api_key="-", model="tgi", max_tokens=100, temperature=0
    )
    answer = chat.with_structured_output(
        {"title": "Person", **PERSON}, method="json_schema"
    ).invoke("Make up a person.")
    jsonschema.validate(answer, PERSON)


# ---------------------------------------------------------------------- all at once


async def test_clients_of_all_kinds_share_the_server(server: Server) -> None:
    native = text_generation.AsyncClient(server.url)
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="-") as chat:
        answers = await asyncio.gather(
            *(native.generate(PROMPT, max_new_tokens=4) for _ in range(4)),
            *(
                chat.chat.completions.create(
                    model="tgi", messages=MESSAGES, max_tokens=8, temperature=0
                )
                for _ in range(4)
            ),
        )
    assert len({answer.generated_text for answer in answers[:4]}) == 1
    assert len({answer.choices[0].message.content for answer in answers[4:]}) == 1
