import asyncio
import json

import pytest
from tests.fakes.fake_loop import COLON, EOS, FAILED, FakeLoop, end, step_events_of
from tests.fakes.fake_server import events_of, flat_error, serving

from kagami_proto.errors import GenerationFailed
from kagami_router.request.values import FinishReason, StreamEvent, Token

REQUEST = {"inputs": "Test request", "parameters": {"max_new_tokens": 2}}
DETAILS = {"inputs": "Test request", "parameters": {"max_new_tokens": 2, "details": True}}


async def test_generate_answers_one_object() -> None:
    async with serving() as server, server.post("/generate", REQUEST) as response:
        assert response.status == 200
        assert response.headers["content-type"] == "application/json"
        assert await response.read() == b'{"generated_text":" failed:"}'


async def test_details_have_the_bytes_of_the_golden_transcript() -> None:
    async with serving() as server, server.post("/generate", DETAILS) as response:
        assert await response.read() == (
            b'{"generated_text":" failed:","details":{"finish_reason":"length",'
            b'"generated_tokens":2,"seed":null,"prefill":[],"tokens":['
            b'{"id":5229,"text":" failed","logprob":-2.5839844,"special":false},'
            b'{"id":29901,"text":":","logprob":-0.44970703,"special":false}]}}'
        )


async def test_whole_answers_carry_all_headers() -> None:
    async with serving() as server, server.post("/generate", REQUEST) as response:
        headers = response.headers
        assert headers["x-compute-type"] == "1-fake"
        assert headers["x-compute-characters"] == "12"
        assert headers["x-prompt-tokens"] == "13"
        assert headers["x-generated-tokens"] == "2"
        assert float(headers["x-compute-time"]) < 1
        for name in ("total", "validation", "queue", "inference"):
            assert headers[f"x-{name}-time"].isdigit()
        assert headers["x-time-per-token"].isdigit()


async def test_compat_answers_a_list_with_the_prompt_in_the_text() -> None:
    async with serving() as server, server.post("/", REQUEST) as response:
        assert await response.json() == [{"generated_text": "Test request failed:"}]


async def test_compat_leaves_the_prompt_out_on_request() -> None:
    body = {"inputs": "Test request", "parameters": {"return_full_text": False}}
    async with serving() as server, server.post("/", body) as response:
        assert await response.json() == [{"generated_text": " failed:"}]


async def test_stream_has_the_bytes_of_the_golden_transcript() -> None:
    async with serving() as server, server.post("/generate_stream", DETAILS) as response:
        assert response.headers["content-type"] == "text/event-stream"
        assert response.headers["cache-control"] == "no-cache"
        assert response.headers["x-accel-buffering"] == "no"
        assert response.headers["x-compute-type"] == "1-fake"
        assert response.headers["x-compute-characters"] == "12"
        body = await response.read()
        assert body[: body.index(b": x-")] == (
            b'data: {"index":1,"token":{"id":5229,"text":" failed","logprob":-2.5839844,'
            b'"special":false},"generated_text":null,"details":null}\n\n'
            b'data: {"index":2,"token":{"id":29901,"text":":","logprob":-0.44970703,'
            b'"special":false},"generated_text":" failed:","details":{"finish_reason":"length",'
            b'"generated_tokens":2,"seed":null,"input_length":13}}\n\n'
        )


async def test_compat_streams_too() -> None:
    async with serving() as server, server.post("/", REQUEST | {"stream": True}) as response:
        lines = await events_of(response)
        assert json.loads(lines[1].removeprefix("data: "))["generated_text"] == (
            "Test request failed:"
        )


async def test_events_of_one_step_leave_in_one_write() -> None:
    both = (StreamEvent(FAILED), StreamEvent(COLON, end=end(" failed:", 2)))
    loop = FakeLoop(lambda _: [both])
    async with serving(loop) as server, server.post("/generate_stream", REQUEST) as response:
        chunk = (await response.content.readchunk())[0]
        assert chunk.count(b"data: ") == 2


async def test_top_tokens_stand_between_token_and_text() -> None:
    body = {"inputs": "a", "parameters": {"top_n_tokens": 2}}
    async with serving() as server, server.post("/generate_stream", body) as response:
        event = (await events_of(response))[0]
        assert list(json.loads(event.removeprefix("data: "))) == [
            "index",
            "token",
            "top_tokens",
            "generated_text",
            "details",
        ]


async def test_prefill_is_returned_with_a_null_first() -> None:
    body = {"inputs": "ab", "parameters": {"decoder_input_details": True}}
    async with serving() as server, server.post("/generate", body) as response:
        prefill = (await response.json())["details"]["prefill"]
        assert [token["logprob"] for token in prefill] == [None, -1.5, -1.5]


async def test_best_of_returns_the_best_mean_and_the_others_in_its_details() -> None:
    logprobs = iter((-3.0, -1.0))

    def play(request: object) -> list:
        return [*step_events_of([Token(7, "x", next(logprobs), False)])]

    body = {"inputs": "a", "parameters": {"best_of": 2, "do_sample": True, "details": True}}
    async with serving(FakeLoop(play)) as server, server.post("/generate", body) as response:
        details = (await response.json())["details"]
        assert details["tokens"][0]["logprob"] == -1.0
        assert details["best_of_sequences"][0]["tokens"][0]["logprob"] == -3.0
        assert list(details) == [
            "finish_reason",
            "generated_tokens",
            "seed",
            "prefill",
            "tokens",
            "best_of_sequences",
        ]
        seeds = [request.sampling.seed for request in server.loop.requests]
        assert seeds[0] != seeds[1]


async def test_without_parameters_it_samples_and_with_empty_ones_it_does_not() -> None:
    async with serving() as server:
        await server.post("/generate", {"inputs": "a"})
        await server.post("/generate", {"inputs": "a", "parameters": {}})
        assert [one.sampling.do_sample for one in server.loop.requests] == [True, False]


async def test_a_64_bit_seed_goes_in_and_comes_out() -> None:
    seed = 2**64 - 1
    body = {"inputs": "a", "parameters": {"seed": seed, "do_sample": True, "details": True}}
    async with serving() as server, server.post("/generate", body) as response:
        assert (await response.json())["details"]["seed"] == seed
        assert server.loop.requests[0].sampling.seed == seed


@pytest.mark.parametrize("path", ["/generate", "/generate_stream", "/"])
async def test_a_refused_request_has_a_real_status_on_every_route(path: str) -> None:
    body = {"inputs": "", "stream": True}
    async with serving() as server, server.post(path, body) as response:
        assert response.status == 422
        assert await response.read() == (
            b'{"error":"Input validation error: `inputs` cannot be empty",'
            b'"error_type":"validation"}'
        )
        assert response.content_length


@pytest.mark.parametrize("path", ["/generate", "/generate_stream"])
async def test_the_request_over_the_limit_gets_429(path: str) -> None:
    loop = FakeLoop()
    loop.gate.clear()
    async with serving(loop, max_concurrent_requests=1) as server:
        async with server.post("/generate_stream", REQUEST) as first:
            await first.content.readline()
            async with server.post(path, REQUEST) as second:
                assert second.status == 429
                assert await second.json() == {
                    "error": "Model is overloaded",
                    "error_type": "overloaded",
                }
            loop.gate.set()
            await first.read()
        assert server.has_all_permits()


async def test_a_failure_before_the_end_is_424() -> None:
    loop = FakeLoop(lambda _: [(StreamEvent(FAILED),), GenerationFailed("Server error: boom")])
    async with serving(loop) as server, server.post("/generate", REQUEST) as response:
        assert response.status == 424
        assert await flat_error(response) == {
            "error": "Request failed during generation: Server error: boom",
            "error_type": "generation",
        }


async def test_a_failure_in_a_stream_is_an_event() -> None:
    loop = FakeLoop(lambda _: [(StreamEvent(FAILED),), GenerationFailed("Server error: boom")])
    async with serving(loop) as server, server.post("/generate_stream", REQUEST) as response:
        last = (await events_of(response))[-2]
        assert last == (
            'data: {"error":"Request failed during generation: Server error: boom",'
            '"error_type":"generation"}'
        )
        assert 'tgi_request_failure{err="generation"} 1' in server.readiness.metrics.render()


async def test_a_bug_is_a_500_and_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    loop = FakeLoop(lambda _: [ZeroDivisionError("secret")])
    async with serving(loop) as server, server.post("/generate", REQUEST) as response:
        assert response.status == 500
        assert "secret" not in await response.text()
    assert "Internal error" in caplog.text


@pytest.mark.parametrize("path", ["/generate", "/generate_stream"])
async def test_a_client_that_goes_away_cancels_its_generation(path: str) -> None:
    loop = FakeLoop(lambda _: [*step_events_of([FAILED, COLON])])
    loop.gate.clear()
    async with serving(loop) as server:
        call = asyncio.ensure_future(server.post(path, REQUEST).__aenter__())
        await loop.entered.wait()
        if path == "/generate":
            call.cancel()
            await asyncio.wait([call])
        else:
            (await call).close()
        async with asyncio.timeout(5):
            await loop.left.wait()
            await server.state.infer.drain(5, 0)
        assert loop.num_open == 0
        assert 'tgi_request_failure{err="dropped"} 1' in server.readiness.metrics.render()


async def test_held_back_text_comes_before_a_special_last_token() -> None:
    loop = FakeLoop(lambda _: [*step_events_of([FAILED, EOS], FinishReason.EOS_TOKEN, tail="!")])
    async with serving(loop) as server, server.post("/generate_stream", REQUEST) as response:
        last = json.loads((await events_of(response))[1].removeprefix("data: "))
        assert last["token"]["text"] == "!</s>"
        assert last["generated_text"] == " failed!"


async def test_prompt_details_are_those_of_what_truncate_left() -> None:
    parameters = {"decoder_input_details": True, "truncate": 2}
    body = {"inputs": "abcd", "parameters": parameters}
    async with serving() as server, server.post("/generate", body) as response:
        prefill = (await response.json())["details"]["prefill"]
        kept = server.loop.requests[0].prompt_ids
    assert [token["id"] for token in prefill] == list(kept)
    assert [token["logprob"] for token in prefill] == [None, -1.5]


@pytest.mark.parametrize(
    ("path", "asked", "is_full"),
    [
        ("/generate", None, False),
        ("/generate", True, True),
        ("/generate", False, False),
        ("/", None, True),
        ("/", True, True),
        ("/", False, False),
    ],
)
@pytest.mark.parametrize("best_of", [1, 2])
async def test_who_gets_the_prompt_in_the_text(
    path: str, asked: bool | None, is_full: bool, best_of: int
) -> None:
    parameters = {"return_full_text": asked, "best_of": best_of, "do_sample": True, "details": True}
    body = {"inputs": "a", "parameters": parameters}
    async with serving() as server, server.post(path, body) as response:
        answer = await response.json()
    answer = answer[0] if path == "/" else answer
    others = answer["details"].get("best_of_sequences", [])
    assert len(others) == best_of - 1
    for one in [answer, *others]:
        assert one["generated_text"] == ("a failed:" if is_full else " failed:")


@pytest.mark.parametrize("path", ["/generate", "/generate_stream", "/"])
async def test_best_of_0_is_1_on_every_route(path: str) -> None:
    body = {"inputs": "a", "parameters": {"best_of": 0}, "stream": True}
    async with serving() as server, server.post(path, body) as response:
        assert response.status == 200
        assert len(server.loop.requests) == 1


@pytest.mark.parametrize("seed", [-1, 2**64, 1.5, "1"])
async def test_a_seed_that_is_no_u64_is_refused(seed: object) -> None:
    body = {"inputs": "a", "parameters": {"seed": seed}}
    async with serving() as server, server.post("/generate", body) as response:
        assert response.status == 422
        assert "seed" in (await flat_error(response))["error"]


async def test_ties_may_bring_more_top_tokens_than_asked_for() -> None:
    loop = FakeLoop(lambda _: [*step_events_of([FAILED], top_tokens=(FAILED, COLON, EOS))])
    body = {"inputs": "a", "parameters": {"top_n_tokens": 2, "details": True}}
    async with serving(loop) as server, server.post("/generate", body) as response:
        (top,) = (await response.json())["details"]["top_tokens"]
    assert [token["id"] for token in top] == [FAILED.id, COLON.id, EOS.id]
