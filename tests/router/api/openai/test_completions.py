import json
import time
from contextlib import suppress
from typing import Any

import pytest
from tests.fakes.byte_tokenizer import byte_tokenizer_with_start
from tests.fakes.fake_loop import COLON, EOS, FAILED, FakeLoop, step_events_of
from tests.fakes.fake_server import events_of, flat_error, serving

from kagami_proto.errors import BatchSizeExceeded, InvalidRequest
from kagami_router.api.openai import completions
from kagami_router.request.values import FinishReason, PrefillToken, Token, ValidRequest

PATH = "/v1/completions"


def echo_loop() -> FakeLoop:
    """Answers every prompt with its own text and an end of sequence."""

    def play(request: ValidRequest) -> list[Any]:
        token = Token(5, f" {request.prompt_text}", -0.5, False)
        return [*step_events_of([token, EOS], FinishReason.EOS_TOKEN)]

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
    assert answer["usage"] == {
        "prompt_tokens": 6,
        "completion_tokens": 6,
        "total_tokens": 12,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    assert response.headers["x-prompt-tokens"] == "6"
    assert response.headers["x-compute-characters"] == "3"


async def test_stream_hides_special_tokens_and_ends_with_usage_as_tgi_does() -> None:
    body = {"prompt": "a", "stream": True}
    async with serving(echo_loop()) as server, server.post(PATH, body) as response:
        lines = await events_of(response)
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
    assert last["usage"] == {
        "prompt_tokens": 2,
        "completion_tokens": 2,
        "total_tokens": 4,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


async def test_stream_options_bring_one_usage_chunk_for_all_prompts() -> None:
    body = {"prompt": ["a", "b"], "stream": True, "stream_options": {"include_usage": True}}
    async with serving(echo_loop()) as server, server.post(PATH, body) as response:
        lines = await events_of(response)
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
            {"prompt": []},
            {
                "error": "prompt: Empty array detected. Do not use an empty array for the prompt.",
                "error_type": "validation",
            },
        ),
    ],
)
async def test_what_is_refused_is_named(fields: dict[str, Any], error: dict[str, str]) -> None:
    async with serving() as server, server.post(PATH, {"prompt": "a"} | fields) as response:
        assert response.status == 422
        assert await flat_error(response) == error


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"logprobs": 6}, "`logprobs` must be >= 0 and <= 5. Given: 6"),
        ({"best_of": 3}, "`best_of` must be > 0 and <= 2. Given: 3"),
        ({"best_of": 1, "n": 2}, "`best_of` must be >= `n`, which is 2. Given: 1"),
        (
            {"best_of": 2, "stream": True},
            "`best_of` > `n` is not supported when streaming tokens. Given: 2",
        ),
        ({"n": 0}, "`n` must be > 0 and <= 2. Given: 0"),
        (
            {"logit_bias": dict.fromkeys(map(str, range(1025)), 1)},
            "`logit_bias` supports up to 1024 token ids. Given: 1025",
        ),
        (
            {"logit_bias": {"7": 101}},
            "`logit_bias` must be >= -100 and <= 100. Given: 101.0 for the id 7",
        ),
        ({"max_tokens": 0}, "`max_new_tokens` must be strictly positive"),
        ({"stop": ["x"] * 5}, "`stop` supports up to 4 stop sequences. Given: 5"),
        ({"prompt": [1, 300]}, "`prompt[1]` must be a token id, >= 0 and < 300. Given: 300"),
        (
            {"prompt": [[1], [2, -1]]},
            "`prompt[1][1]` must be a token id, >= 0 and < 300. Given: -1",
        ),
        ({"prompt": [[1], []]}, "`inputs` cannot be empty"),
        ({"prompt": ["a", ""]}, "`inputs` cannot be empty"),
    ],
)
async def test_what_is_out_of_range_is_named(fields: dict[str, Any], text: str) -> None:
    async with serving() as server, server.post(PATH, {"prompt": "a"} | fields) as response:
        assert response.status == 422
        assert await flat_error(response) == {
            "error": f"Input validation error: {text}",
            "error_type": "validation",
        }
        assert server.loop.requests == []


@pytest.mark.parametrize(
    "prompt",
    [
        None,
        1,
        {},
        [None],
        [1.5],
        [True],
        [1, "a"],
        [[1], 2],
        ["a", [1]],
        [["a"]],
        [[[1]]],
        [[True]],
    ],
)
async def test_a_prompt_of_another_form_is_refused(prompt: Any) -> None:
    async with serving() as server, server.post(PATH, {"prompt": prompt}) as response:
        assert response.status == 422
        assert "prompt" in (await flat_error(response))["error"]


@pytest.mark.parametrize("prompt", [[1] * 900_000, [[1] * 900_000], ["x"] * 400_000])
async def test_a_huge_list_is_refused_before_its_parts_are_looked_at(prompt: list[Any]) -> None:
    async with serving() as server:
        split = completions._split  # the work before the first limit
        started = time.perf_counter()
        with suppress(BatchSizeExceeded):
            for place, given in split(prompt, 4):
                with suppress(InvalidRequest):
                    await server.state.validation.token_prompt(given, place)
        assert time.perf_counter() - started < 0.02


async def test_one_bad_prompt_fails_the_call_and_gives_all_permits_back() -> None:
    async with serving() as server:
        async with server.post(PATH, {"prompt": ["a", ""]}) as response:
            assert response.status == 422
        assert server.has_all_permits()
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


def scored_loop() -> FakeLoop:
    """Answers " failed:</s>"; prompt and output have logprobs and as many alternatives as asked."""

    def play(request: ValidRequest) -> list[Any]:
        top = (COLON, FAILED)[: request.top_n_tokens]
        prefill = tuple(
            PrefillToken(token_id, "", -1.5 if at else None, top if at else ())
            for at, token_id in enumerate(request.prompt_ids)
        )
        return [
            *step_events_of(
                [FAILED, COLON, EOS],
                FinishReason.EOS_TOKEN,
                top_tokens=top,
                prefill=prefill if request.prompt_logprobs else (),
            )
        ]

    return FakeLoop(play)


async def answer_of(loop: FakeLoop, **fields: Any) -> dict[str, Any]:
    async with serving(loop) as server, server.post(PATH, {"prompt": "ab"} | fields) as response:
        assert response.status == 200, await response.text()
        answer: dict[str, Any] = await response.json()
        return answer


async def chunks_of(loop: FakeLoop, **fields: Any) -> list[dict[str, Any]]:
    body = {"prompt": "ab", "stream": True} | fields
    async with serving(loop) as server, server.post(PATH, body) as response:
        lines = await events_of(response)
    assert lines[-2:] == ["data: [DONE]", ""]
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


async def test_logprobs_are_columns_that_start_behind_the_prompt() -> None:
    (choice,) = (await answer_of(scored_loop(), logprobs=1))["choices"]
    assert choice["text"] == " failed:"
    assert choice["logprobs"] == {
        "tokens": [" failed", ":", "</s>"],
        "token_logprobs": [-2.5839844, -0.44970703, -0.0625],
        "top_logprobs": [
            {":": -0.44970703, " failed": -2.5839844},
            {":": -0.44970703},
            {":": -0.44970703, "</s>": -0.0625},
        ],
        "text_offset": [2, 9, 10],
    }


@pytest.mark.parametrize(("asked", "count"), [(0, 0), (2, 2), (True, 1)])
async def test_logprobs_say_how_many_alternatives(asked: Any, count: int) -> None:
    loop = scored_loop()
    (choice,) = (await answer_of(loop, logprobs=asked))["choices"]
    assert loop.requests[0].top_n_tokens == count
    assert " failed" in choice["logprobs"]["top_logprobs"][0]  # the token itself, always


@pytest.mark.parametrize("asked", [None, False])
async def test_no_logprobs_are_null(asked: Any) -> None:
    (choice,) = (await answer_of(scored_loop(), logprobs=asked))["choices"]
    assert choice["logprobs"] is None


async def test_echo_puts_the_prompt_in_front_and_asks_for_nothing_more() -> None:
    loop = scored_loop()
    (choice,) = (await answer_of(loop, echo=True))["choices"]
    assert choice["text"] == "ab failed:"
    assert not loop.requests[0].prompt_logprobs


async def test_echo_with_logprobs_has_those_of_the_prompt_the_first_null() -> None:
    (choice,) = (await answer_of(scored_loop(), echo=True, logprobs=1))["choices"]
    logprobs = choice["logprobs"]
    assert logprobs["tokens"] == ["<s>", "a", "b", " failed", ":", "</s>"]
    assert logprobs["token_logprobs"][:3] == [None, -1.5, -1.5]
    assert logprobs["top_logprobs"][:2] == [None, {":": -0.44970703, "a": -1.5}]
    assert logprobs["text_offset"] == [0, 0, 1, 2, 9, 10]


async def test_without_echo_the_prompts_logprobs_are_not_asked_for() -> None:
    loop = scored_loop()
    await answer_of(loop, logprobs=1)
    assert not loop.requests[0].prompt_logprobs


async def test_no_tokens_with_echo_score_the_prompt_alone() -> None:
    loop = scored_loop()
    answer = await answer_of(loop, echo=True, logprobs=1, max_tokens=0)
    (choice,) = answer["choices"]
    assert choice["text"] == "ab"
    assert choice["finish_reason"] == "length"
    assert choice["logprobs"]["tokens"] == ["<s>", "a", "b"]
    assert answer["usage"]["completion_tokens"] == 0
    assert loop.requests[0].stopping.max_new_tokens == 1


async def test_a_prompt_is_scored_in_a_stream_too() -> None:
    loop = FakeLoop(lambda request: scored_loop().play(request)[-1:])
    (chunk,) = await chunks_of(loop, echo=True, max_tokens=0)
    assert chunk["choices"][0]["text"] == "ab"
    assert chunk["choices"][0]["finish_reason"] == "length"
    assert chunk["usage"]["completion_tokens"] == 0


@pytest.mark.parametrize("echo", [False, True])
async def test_a_streams_chunks_add_up_to_the_whole_answer(echo: bool) -> None:
    fields = {"prompt": ["ab", "cd"], "n": 2, "echo": echo, "logprobs": 2}
    whole = (await answer_of(scored_loop(), **fields))["choices"]
    chunks = await chunks_of(scored_loop(), **fields)
    for choice in whole:
        parts = [
            part
            for chunk in chunks
            for part in chunk["choices"]
            if part["index"] == choice["index"]
        ]
        assert "".join(part["text"] for part in parts) == choice["text"]
        for name, column in choice["logprobs"].items():
            assert [one for part in parts for one in part["logprobs"][name]] == column


async def test_a_prompt_of_token_ids_is_taken_as_it_is() -> None:
    loop = scored_loop()
    ids = byte_tokenizer_with_start().encode("ab", add_special_tokens=False).ids
    (choice,) = (await answer_of(loop, prompt=ids, echo=True, logprobs=0))["choices"]
    assert loop.requests[0].prompt_ids == tuple(ids)
    assert choice["text"] == "ab failed:"
    assert choice["logprobs"]["text_offset"][:3] == [0, 1, 2]


async def test_several_prompts_of_token_ids() -> None:
    loop = scored_loop()
    answer = await answer_of(loop, prompt=[[7, 8], [9]])
    assert [one.prompt_ids for one in loop.requests] == [(7, 8), (9,)]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]


async def test_special_tokens_in_the_prompts_text_count_in_its_offsets() -> None:
    fields = {"prompt": "a</s>b", "echo": True, "logprobs": 0}
    (choice,) = (await answer_of(scored_loop(), **fields))["choices"]
    assert choice["logprobs"]["tokens"][:4] == ["<s>", "a", "</s>", "b"]
    assert choice["logprobs"]["text_offset"][:4] == [0, 0, 1, 5]


async def test_parts_of_a_character_are_named_by_their_bytes() -> None:
    fields = {"prompt": "é!", "echo": True, "logprobs": 0}
    (choice,) = (await answer_of(scored_loop(), **fields))["choices"]
    assert choice["logprobs"]["tokens"][1:3] == ["bytes:\\xc3", "bytes:\\xa9"]
    assert choice["logprobs"]["text_offset"][:5] == [0, 0, 0, 1, 2]


def sampled(*logprobs: float) -> FakeLoop:
    left = iter(logprobs)

    def play(request: ValidRequest) -> list[Any]:
        logprob = next(left)
        return [*step_events_of([Token(7, f"{request.prompt_text}{logprob}", logprob, False)])]

    return FakeLoop(play)


async def test_best_of_answers_with_the_likeliest_of_each_prompt() -> None:
    loop = sampled(-3.0, -1.0, -2.0, -4.0)
    answer = await answer_of(loop, prompt=["a", "b"], best_of=2)
    assert [choice["text"] for choice in answer["choices"]] == ["a-1.0", "b-2.0"]
    assert [choice["index"] for choice in answer["choices"]] == [0, 1]
    assert answer["usage"]["completion_tokens"] == 4  # of all generations, chosen or not
    assert answer["usage"]["prompt_tokens"] == 4


async def test_best_of_as_many_as_choices_keeps_their_order() -> None:
    answer = await answer_of(sampled(-3.0, -1.0), best_of=2, n=2)
    assert [choice["text"] for choice in answer["choices"]] == ["ab-3.0", "ab-1.0"]


async def test_nulls_mean_absent() -> None:
    names = (
        "model max_tokens max_completion_tokens temperature top_p frequency_penalty n best_of echo"
        " presence_penalty stop stream stream_options seed logit_bias logprobs suffix user"
    )
    await answer_of(scored_loop(), **dict.fromkeys(names.split()))


@pytest.mark.parametrize(
    ("given", "used"),
    [
        ({"7": -100, "8": 0.5}, ((7, -100.0), (8, 0.5))),
        ({}, ()),
        ([], ()),
        ([0.5, 1], ()),  # TGI's form, which it ignores
    ],
)
async def test_logit_bias_in_both_forms(given: Any, used: tuple[tuple[int, float], ...]) -> None:
    loop = scored_loop()
    await answer_of(loop, logit_bias=given)
    assert loop.requests[0].sampling.logit_bias == used


async def test_max_completion_tokens_wins_here_too() -> None:
    loop = scored_loop()
    await answer_of(loop, max_tokens=9, max_completion_tokens=5)
    assert loop.requests[0].stopping.max_new_tokens == 5


async def test_long_columns_are_the_same_from_a_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    fields = {"echo": True, "logprobs": 2}
    inline = (await answer_of(scored_loop(), **fields))["choices"]
    monkeypatch.setattr("kagami_router.api.answering.respond.INLINE_TOKENS", 0)
    assert (await answer_of(scored_loop(), **fields))["choices"] == inline
    chunks = await chunks_of(scored_loop(), **fields)
    tokens = [token for one in chunks for token in one["choices"][0]["logprobs"]["tokens"]]
    assert tokens == inline[0]["logprobs"]["tokens"]
