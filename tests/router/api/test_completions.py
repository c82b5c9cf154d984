import json
from typing import Any

import pytest
from tests.fakes.fake_loop import EOS, FakeLoop, turns_of
from tests.fakes.fake_server import serving

from kagami_router.requests import FinishReason, Token, ValidRequest

PATH = "/v1/completions"


def echo_loop() -> FakeLoop:
    """Every prompt is answered with its own text and an end of sequence."""

    def play(request: ValidRequest) -> list[Any]:
        token = Token(5, f" {request.prompt_text}", -0.5, False)
        return [*turns_of([token, EOS], FinishReason.EOS_TOKEN)]

    return FakeLoop(play)


async def test_choices_stand_in_the_order_of_the_prompts() -> None:
    body = {"prompt": ["a", "b", "c"], "max_tokens": 5}
    async with serving(echo_loop()) as server, server.post(PATH, body) as response:
        answer = await response.json()
    assert answer["object"] == "text_completion"
    assert answer["id"].startswith("cmpl-")
    assert answer["choices"] == [
        {"index": index, "text": f" {text}", "logprobs": None, "finish_reason": "stop"}
        for index, text in enumerate("abc")
    ]
    assert answer["usage"] == {"prompt_tokens": 6, "completion_tokens": 6, "total_tokens": 12}
    assert response.headers["x-prompt-tokens"] == "6"
    assert response.headers["x-compute-characters"] == "3"


async def test_stream_hides_special_tokens_and_ends_with_usage_as_tgi_does() -> None:
    body = {"prompt": "a", "stream": True}
    async with serving(echo_loop()) as server, server.post(PATH, body) as response:
        lines = (await response.text()).split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    first, last = (json.loads(line.removeprefix("data: ")) for line in lines[:-2])
    assert first["choices"] == [{"index": 0, "text": " a", "logprobs": None, "finish_reason": None}]
    assert first["usage"] is None
    assert last["choices"][0] == {
        "index": 0,
        "text": "",
        "logprobs": None,
        "finish_reason": "stop",
    }
    assert last["usage"] == {"prompt_tokens": 2, "completion_tokens": 2, "total_tokens": 4}


async def test_stream_options_bring_one_usage_chunk_for_all_prompts() -> None:
    body = {"prompt": ["a", "b"], "stream": True, "stream_options": {"include_usage": True}}
    async with serving(echo_loop()) as server, server.post(PATH, body) as response:
        lines = (await response.text()).split("\n\n")
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    assert [chunk["usage"] for chunk in chunks[:-1]] == [None] * 4
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["total_tokens"] == 8


async def test_n_counts_within_each_prompt() -> None:
    body = {"prompt": ["a", "b"], "n": 2}
    async with serving(echo_loop()) as server, server.post(PATH, body) as response:
        answer = await response.json()
    assert [choice["text"] for choice in answer["choices"]] == [" a", " a", " b", " b"]
    assert answer["usage"]["prompt_tokens"] == 4


@pytest.mark.parametrize(
    ("fields", "error"),
    [
        (
            {"suffix": "x"},
            {
                "error": "Suffix is not supported and can be achieved by preprocessing the prompt.",
                "error_type": "suffix not supported",
            },
        ),
        (
            {"prompt": ["a"] * 5},
            {
                "error": "Number of prompts exceeds the maximum allowed batch size of 4",
                "error_type": "batch size exceeded",
            },
        ),
        (
            {"echo": True},
            {
                "error": "Input validation error: `echo` is not supported yet",
                "error_type": "validation",
            },
        ),
        (
            {"logprobs": 1},
            {
                "error": "Input validation error: `logprobs` is not supported yet on this route",
                "error_type": "validation",
            },
        ),
        (
            {"best_of": 2},
            {
                "error": "Input validation error: `best_of` > `n` is not supported yet",
                "error_type": "validation",
            },
        ),
        (
            {"prompt": []},
            {
                "error": "prompt: Empty array detected. Do not use an empty array for the prompt.",
                "error_type": "validation",
            },
        ),
        (
            {"prompt": [1, 2]},
            {"error": "prompt: expected a text or a list of texts", "error_type": "validation"},
        ),
    ],
)
async def test_what_is_refused_is_named(fields: dict[str, Any], error: dict[str, str]) -> None:
    async with serving() as server, server.post(PATH, {"prompt": "a"} | fields) as response:
        assert response.status == 422
        assert await response.json() == error


async def test_one_bad_prompt_fails_the_call_and_gives_all_permits_back() -> None:
    async with serving() as server:
        async with server.post(PATH, {"prompt": ["a", ""]}) as response:
            assert response.status == 422
        assert server.front.infer.num_permits_held == 0
        assert server.loop.requests == []


async def test_each_prompt_takes_a_permit() -> None:
    async with serving(max_concurrent_requests=2) as server:
        async with server.post(PATH, {"prompt": ["a", "b", "c"]}) as response:
            assert response.status == 429
            assert response.headers["retry-after"] == "1"


async def test_what_load_tools_send_is_accepted() -> None:
    body = {
        "prompt": "a",
        "ignore_eos": True,
        "min_tokens": 3,
        "logprobs": None,
        "n": 1,
        "best_of": 1,
        "top_p": 1,
        "frequency_penalty": 0,
        "presence_penalty": 0,
        "echo": False,
    }
    async with serving(echo_loop()) as server, server.post(PATH, body) as response:
        assert response.status == 200
        assert server.loop.requests[0].stopping.ignore_eos
