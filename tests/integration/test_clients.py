"""What users run against the server: the seed article's calls, huggingface_hub and openai."""

import asyncio
import json
import subprocess

import openai
import pytest
from huggingface_hub import AsyncInferenceClient, InferenceClient
from tests.integration.conftest import Server

pytestmark = pytest.mark.slow
QUESTION = "日本で一番高い山はなんですか？"
MESSAGES = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]


def curl(url: str, body: str) -> str:
    command = ["curl", "-sS", url, "-X", "POST", "-d", body, "-H", "Content-Type: application/json"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_the_articles_curl_calls(bf16_server: Server) -> None:
    body = '{"inputs":"日本で一番高い山はなんですか？","parameters":{"max_new_tokens":20}}'

    answer = json.loads(curl(f"{bf16_server.url}/generate", body))
    stream = curl(f"{bf16_server.url}/generate_stream", body)

    lines = [line for line in stream.splitlines() if line]
    events = [json.loads(line.removeprefix("data:")) for line in lines if line[0] != ":"]
    assert list(answer) == ["generated_text"]
    assert list(events[0]) == ["index", "token", "generated_text", "details"]
    assert list(events[0]["token"]) == ["id", "text", "logprob", "special"]
    assert [event["generated_text"] for event in events[:-1]] == [None] * (len(events) - 1)
    assert events[-1]["generated_text"] == answer["generated_text"]


def test_the_articles_python_snippets(bf16_server: Server) -> None:
    client = InferenceClient(model=bf16_server.url)

    response = client.text_generation(prompt=QUESTION, max_new_tokens=20)
    tokens = list(client.text_generation(prompt=QUESTION, max_new_tokens=20, stream=True))

    # `/` returns the prompt too where no pipeline tag is known, as TGI does for a local model.
    assert response.startswith(QUESTION)
    assert "".join(tokens) == response.removeprefix(QUESTION)


def test_huggingface_hub_chat(bf16_server: Server) -> None:
    client = InferenceClient(base_url=bf16_server.url)

    answer = client.chat_completion(MESSAGES, max_tokens=12, temperature=0)
    chunks = list(client.chat_completion(MESSAGES, max_tokens=12, temperature=0, stream=True))

    text = answer.choices[0].message.content
    assert "Paris" in text
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text
    assert chunks[-1].choices[0].finish_reason == answer.choices[0].finish_reason


async def test_huggingface_hub_async(bf16_server: Server) -> None:
    async with AsyncInferenceClient(bf16_server.url) as client:
        details = await client.text_generation(
            "The capital of France is", max_new_tokens=2, details=True, return_full_text=False
        )

    assert details.generated_text == " Paris."
    assert [token.text for token in details.details.tokens] == [" Paris", "."]


@pytest.fixture
def client(bf16_server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{bf16_server.url}/v1", api_key="-", max_retries=0)


def test_openai_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tgi", messages=MESSAGES, max_tokens=12, temperature=0
    )
    stream = client.chat.completions.create(
        model="tgi",
        messages=MESSAGES,
        max_tokens=12,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )

    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert answer.choices[0].message.content == text
    assert "Paris" in text
    first, second = answer.usage, chunks[-1].usage
    assert first is not None
    assert second is not None
    assert (first.prompt_tokens, first.completion_tokens, first.total_tokens) == (
        second.prompt_tokens,
        second.completion_tokens,
        second.total_tokens,
    )
    assert second.prompt_tokens_details is not None
    assert (second.prompt_tokens_details.cached_tokens or 0) >= 16  # a block of the first call's
    assert answer.choices[0].finish_reason == "stop"


def test_openai_completions(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="tgi", prompt=["The capital of France is", "2, 4, 6,"], max_tokens=4, temperature=0
    )

    assert [choice.index for choice in answer.choices] == [0, 1]
    assert answer.choices[0].text.startswith(" Paris")
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 8


def test_openai_stop_is_cut_off(client: openai.OpenAI) -> None:
    arguments = {"model": "tgi", "prompt": "1, 2, 3, 4, 5,", "max_tokens": 20, "temperature": 0}
    answer = client.completions.create(**arguments, stop="9")
    chunks = list(client.completions.create(**arguments, stop=["9"], stream=True))

    assert answer.choices[0].text == " 6, 7, 8, "
    assert answer.choices[0].finish_reason == "stop"
    assert "".join(chunk.choices[0].text for chunk in chunks) == " 6, 7, 8, "


def test_openai_errors_are_typed(client: openai.OpenAI) -> None:
    with pytest.raises(openai.UnprocessableEntityError) as raised:
        client.chat.completions.create(model="tgi", messages=MESSAGES, top_p=7)

    assert "top_p" in str(raised.value.body)


async def test_many_openai_streams_at_once(bf16_server: Server) -> None:
    async with openai.AsyncOpenAI(base_url=f"{bf16_server.url}/v1", api_key="-") as client:

        async def one() -> str:
            stream = await client.chat.completions.create(
                model="tgi", messages=MESSAGES, max_tokens=12, temperature=0, stream=True
            )
            return "".join([c.choices[0].delta.content or "" async for c in stream])

        texts = await asyncio.gather(*(one() for _ in range(24)))

    assert len(set(texts)) == 1
