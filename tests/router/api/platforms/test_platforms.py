"""SageMaker, Vertex AI and KServe over the fakes."""

from typing import Any

import pytest
from tests.fakes.fake_loop import FAILED, FakeLoop, step_events_of
from tests.fakes.fake_server import events_of, flat_error, serving

from kagami_proto.errors import GenerationFailed
from kagami_router.request.values import StreamEvent, Token, ValidRequest

CHAT = {"messages": [{"role": "user", "content": "Say hi"}]}
INFER = "/v2/models/m/versions/1/infer"


def echo(request: ValidRequest) -> list[Any]:
    """Answers with one token whose text is the prompt's text and an exclamation mark."""
    return [*step_events_of([Token(5, f"{request.prompt_text}!", -0.5, False)])]


# ---------------------------------------------------------------------- /invocations


@pytest.mark.parametrize(
    ("body", "is_kind"),
    [
        ({"inputs": "a"}, lambda answer: answer[0]["generated_text"] == "a failed:"),
        (CHAT, lambda answer: answer["object"] == "chat.completion"),
        ({"prompt": "a"}, lambda answer: answer["object"] == "text_completion"),
    ],
)
async def test_invocations_answer_as_the_route_that_the_body_fits(
    body: dict[str, Any], is_kind: Any
) -> None:
    async with serving() as server, server.post("/invocations", body) as response:
        assert response.status == 200
        assert is_kind(await response.json())
        assert "x-total-time" in response.headers


@pytest.mark.parametrize("body", [{"inputs": "a"}, CHAT, {"prompt": "a"}])
async def test_invocations_stream(body: dict[str, Any]) -> None:
    async with serving() as server:
        async with server.post("/invocations", body | {"stream": True}) as response:
            assert len(await events_of(response)) > 2


@pytest.mark.parametrize(
    ("body", "text"), [({}, "expected one of the fields"), ({"inputs": 1}, "inputs: Expected")]
)
async def test_invocations_refuse_what_fits_no_route(body: object, text: str) -> None:
    async with serving() as server, server.post("/invocations", body) as response:
        assert response.status == 422
        assert text in (await flat_error(response))["error"]


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize("stream", [False, True])
async def test_invocations_fail_in_the_format_of_the_route_that_the_body_fits(
    path: str, stream: bool
) -> None:
    body = (CHAT if "chat" in path else {"prompt": "a"}) | {"stream": stream}
    loop = FakeLoop(lambda _: [(StreamEvent(FAILED),), GenerationFailed("boom")])
    async with serving(loop) as server:
        async with server.post(path, body) as response:
            expected = (await response.read()).rpartition(b'{"error"')[2]
            assert b"boom" in expected
        async with server.post("/invocations", body) as response:
            assert (await response.read()).rpartition(b'{"error"')[2] == expected


async def test_a_member_that_is_null_does_not_decide_the_route() -> None:
    body = {"inputs": None, "parameters": None, **CHAT}
    async with serving() as server, server.post("/invocations", body) as response:
        assert (await response.json())["object"] == "chat.completion"


async def test_an_invocation_counts_once() -> None:
    async with serving() as server:
        async with server.post("/invocations", CHAT) as response:
            await response.read()
        assert "\ntgi_request_count 1\n" in server.readiness.metrics.render()


# ---------------------------------------------------------------------- Vertex


async def test_vertex_answers_in_the_order_of_its_instances() -> None:
    instances = [{"inputs": "a"}, CHAT, {"inputs": "b", "parameters": None}]
    async with serving(FakeLoop(echo)) as server:
        async with server.post("/vertex", {"instances": instances}) as response:
            predictions = (await response.json())["predictions"]
    assert predictions[0] == "a!"
    assert predictions[1].endswith("<|assistant|>!")
    assert predictions[2] == "b!"


@pytest.mark.parametrize(
    ("parameters", "is_sampled"),
    [({"max_new_tokens": 2}, True), ({"do_sample": False}, False), (None, True)],
)
async def test_vertex_samples_unless_told_otherwise(parameters: object, is_sampled: bool) -> None:
    instance = {"inputs": "a", "parameters": parameters}
    async with serving() as server:
        async with server.post("/vertex", {"instances": [instance]}) as response:
            assert response.status == 200
        (request,) = server.loop.requests
    assert request.sampling.do_sample is is_sampled


async def test_all_parameters_of_a_vertex_instance_count() -> None:
    parameters = {"max_new_tokens": 3, "seed": 7, "top_k": 4, "stop": ["x"]}
    async with serving() as server:
        body = {"instances": [{"inputs": "a", "parameters": parameters}]}
        async with server.post("/vertex", body) as response:
            await response.read()
        (request,) = server.loop.requests
    assert (request.sampling.seed, request.sampling.top_k) == (7, 4)
    assert (request.stopping.max_new_tokens, request.stopping.stop) == (3, ("x",))


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ({"instances": []}, "`instances` cannot be empty"),
        ({"instances": [{"inputs": ""}]}, "`inputs` cannot be empty"),
        ({"instances": [{"inputs": 1}]}, "instances[0].inputs: Expected `str`"),
        ({"instances": [{"inputs": "a"}, {}]}, "instances[1]: Object missing required"),
        ({"instances": [{"inputs": "a", "parameters": {"best_of": 2}}]}, "one sample"),
    ],
)
async def test_vertex_names_what_is_wrong(body: object, text: str) -> None:
    async with serving() as server, server.post("/vertex", body) as response:
        assert response.status == 422
        assert text in (await flat_error(response))["error"]


@pytest.mark.parametrize(
    ("loop", "permits", "status"),
    [
        (FakeLoop(lambda _: [GenerationFailed("boom")]), 4, 424),
        (FakeLoop(), 1, 429),
    ],
)
async def test_vertex_answers_with_the_real_status(
    loop: FakeLoop, permits: int, status: int
) -> None:
    body = {"instances": [{"inputs": "a"}, {"inputs": "b"}]}
    async with serving(loop, max_concurrent_requests=permits) as server:
        async with server.post("/vertex", body) as response:
            assert response.status == status


async def test_vertex_ai_finds_the_routes_it_names() -> None:
    async with serving(aip_routes=("/predict", "/alive"), key="k") as server:
        async with server.http.get("/alive") as response:
            assert response.status == 200
        headers = {"authorization": "Bearer k"}
        body = {"instances": [{"inputs": "a"}]}
        async with server.post("/predict", body) as response:
            assert response.status == 401
        async with server.post("/predict", body, headers=headers) as response:
            assert (await response.json())["predictions"] == [" failed:"]


async def test_vertex_ai_may_name_routes_that_are_there() -> None:
    async with serving(aip_routes=("/vertex", "/health")) as server:
        async with server.http.get("/health") as response:
            assert response.status == 200


# ---------------------------------------------------------------------- KServe


def inputs(*datas: object) -> dict[str, Any]:
    return {
        "id": "7",
        "inputs": [
            {"name": f"in{n}", "shape": [1], "datatype": "BYTES", "data": data}
            for n, data in enumerate(datas)
        ],
    }


async def test_kserve_takes_and_gives_bytes_in_order() -> None:
    body = inputs(list("é".encode()), list(b"b")) | {"outputs": [{"name": "x"}, {"name": "y"}]}
    async with serving(FakeLoop(echo)) as server, server.post(INFER, body) as response:
        answer = await response.json()
    assert answer == {
        "id": "7",
        "outputs": [
            {"name": "x", "shape": [1, 3], "datatype": "BYTES", "data": list("é!".encode())},
            {"name": "y", "shape": [1, 2], "datatype": "BYTES", "data": list(b"b!")},
        ],
    }


async def test_kserve_takes_and_gives_texts_too() -> None:
    async with serving(FakeLoop(echo)) as server, server.post(INFER, inputs(["é"])) as response:
        (output,) = (await response.json())["outputs"]
    assert output == {"name": "in0", "shape": [1], "datatype": "BYTES", "data": ["é!"]}


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (inputs([255]), "utf8"),
        (inputs([256]), "validation"),
        (inputs([97, "a"]), "validation"),
        (inputs(["a", "b"]), "validation"),
        (inputs([]), "validation"),
        (inputs(), "validation"),
        (inputs([97]) | {"outputs": []}, "length mismatch"),
        (inputs([97]) | {"parameters": {"best_of": 2, "do_sample": True}}, "validation"),
    ],
)
async def test_kserve_refuses_by_name(body: object, kind: str) -> None:
    async with serving() as server, server.post(INFER, body) as response:
        assert response.status == 422
        assert (await flat_error(response))["error_type"] == kind


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v2/health/live", {"live": True}),
        ("/v2/health/ready", {"live": True}),
        ("/v2/models/m/versions/1/ready", {"live": True}),
        (
            "/v2",
            {
                "name": "text-generation-inference",
                "version": "3.3.7",
                "extensions": ["health", "models", "metrics"],
            },
        ),
        (
            "/v2/models/m/versions/1",
            {"name": "m", "version": "1", "extensions": ["infer", "ready"]},
        ),
    ],
)
async def test_kserve_gives_its_metadata(path: str, body: object) -> None:
    async with serving() as server, server.http.get(path) as response:
        assert await response.json() == body


async def test_kserve_counts_by_route() -> None:
    async with serving() as server:
        async with server.post(INFER, inputs(["a"])) as response:
            assert response.status == 200
        assert "\ntgi_request_success 1\n" in server.readiness.metrics.render()
