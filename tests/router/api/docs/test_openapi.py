"""The OpenAPI document against the code, and the page that shows it."""

import json
from typing import Any

import jsonschema
import msgspec
import pytest
from tests.fakes.fake_server import events_of, serving

from kagami_router.api.docs.field_texts import FIELD_TEXTS
from kagami_router.api.routes import ROUTES, document
from kagami_router.api.schemas.chunks import ChatChunk, CompletionChunk

DOCUMENT = json.loads(document())
SCHEMAS = DOCUMENT["components"]["schemas"]

# Paths, and members of schemas, of the document of TGI 3.3.
TGI_PATHS = {
    "/": "post",
    "/chat_tokenize": "post",
    "/generate": "post",
    "/generate_stream": "post",
    "/health": "get",
    "/info": "get",
    "/invocations": "post",
    "/metrics": "get",
    "/tokenize": "post",
    "/v1/chat/completions": "post",
    "/v1/completions": "post",
    "/v1/models": "get",
}
TGI_SCHEMAS = {
    "BestOfSequence": "finish_reason generated_text generated_tokens prefill seed tokens"
    " top_tokens",
    "OpenAIAnswer_ChatChoice_": "choices created id model system_fingerprint usage",
    "ChatChunkChoice": "delta finish_reason index logprobs",
    "ChatChunk": "choices created id model system_fingerprint usage",
    "ChatChoice": "finish_reason index logprobs message",
    "ChatLogprob": "logprob token top_logprobs",
    "ChatLogprobs": "content",
    "TopLogprob": "logprob token",
    "ChatRequest": "frequency_penalty logit_bias logprobs max_tokens messages model n"
    " presence_penalty response_format seed stop stream stream_options temperature tool_choice"
    " tool_prompt tools top_logprobs top_p",
    "ChatTokenizeResponse": "templated_text tokenize_response",
    "CompletionChunk": "choices created id model system_fingerprint usage",
    "CompatGenerateRequest": "inputs parameters stream",
    "CompletionChoice": "finish_reason index logprobs text",
    "CompletionRequest": "frequency_penalty max_tokens model prompt repetition_penalty seed stop"
    " stream suffix temperature top_p",
    "ToolCallDelta": "function id index type",
    "Details": "best_of_sequences finish_reason generated_tokens prefill seed tokens top_tokens",
    "ErrorResponse": "error error_type",
    "FunctionCall": "arguments name",
    "GenerateParameters": "adapter_id best_of decoder_input_details details do_sample"
    " frequency_penalty grammar max_new_tokens repetition_penalty return_full_text seed stop"
    " temperature top_k top_n_tokens top_p truncate typical_p watermark",
    "GenerateRequest": "inputs parameters",
    "GenerateResponse": "details generated_text",
    "GrammarType": "type value",
    "Info": "docker_label max_best_of max_client_batch_size max_concurrent_requests"
    " max_input_tokens max_stop_sequences max_total_tokens model_id model_pipeline_tag model_sha"
    " router sha validation_workers version",
    "Model": "created id object owned_by",
    "PrefillTokenOut": "id logprob text",
    "SimpleToken": "id start stop text",
    "StreamDetails": "finish_reason generated_tokens input_length seed",
    "StreamOptions": "include_usage",
    "StreamResponse": "details generated_text index token top_tokens",
    "ChatMessage": "content role",
    "TokenOut": "id logprob special text",
    "ToolCall": "function id type",
    "Usage": "completion_tokens prompt_tokens total_tokens",
}


def test_every_route_is_in_the_document() -> None:
    for route in ROUTES:
        path = route.path.replace(":.+", "").replace(":[^/]*", "")
        assert route.method.lower() in DOCUMENT["paths"][path]


def test_every_operation_says_what_it_is() -> None:
    ids = set()
    for path in DOCUMENT["paths"].values():
        for operation in path.values():
            assert operation["summary"].endswith(".")
            ids.add(operation["operationId"])
    assert len(ids) == len(ROUTES)


def test_all_that_tgi_documents_is_there() -> None:
    for path, method in TGI_PATHS.items():
        assert method in DOCUMENT["paths"][path]
    for name, members in TGI_SCHEMAS.items():
        assert set(members.split()) <= set(SCHEMAS[name]["properties"]), name


def test_what_tgis_document_got_wrong_is_right() -> None:
    assert DOCUMENT["paths"]["/"]["post"]["responses"]["200"]["content"]["application/json"][
        "schema"
    ] == {"type": "array", "items": {"$ref": "#/components/schemas/GenerateResponse"}}
    assert SCHEMAS["GenerateParameters"]["properties"]["details"]["default"] is False
    assert "max_completion_tokens" in SCHEMAS["ChatRequest"]["properties"]
    statuses = DOCUMENT["paths"]["/generate"]["post"]["responses"]
    assert {"400", "401", "413", "415", "422", "424", "429", "500", "503"} <= set(statuses)


@pytest.mark.parametrize("name", FIELD_TEXTS)
def test_every_field_of_a_request_is_described(name: str) -> None:
    fields = SCHEMAS[name]["properties"]
    assert [one for one, field in fields.items() if not field.get("description")] == []


def test_every_schema_is_a_valid_one() -> None:
    for schema in SCHEMAS.values():
        jsonschema.Draft202012Validator.check_schema(schema)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (route.path, route.operation.example)
        for route in ROUTES
        if route.operation.example and "{" not in route.path
    ],
)
async def test_examples_are_served_and_answers_fit_the_document(
    path: str, body: dict[str, Any]
) -> None:
    async with serving() as server, server.post(path, body) as response:
        assert response.status == 200
        if response.content_type == "application/json":
            check_answer(path, 200, await response.json())


def check_answer(path: str, status: int, answer: object) -> None:
    documented = DOCUMENT["paths"][path]["post"]["responses"][str(status)]
    schema = documented["content"]["application/json"]["schema"]
    jsonschema.validate(answer, {**schema, "components": DOCUMENT["components"]})


@pytest.mark.parametrize("body", [{}, {"inputs": ""}, {"messages": []}, {"prompt": ""}])
@pytest.mark.parametrize(
    "path", [one.path for one in ROUTES if one.method == "POST" and "{" not in one.path]
)
async def test_refusals_fit_the_document(path: str, body: object) -> None:
    async with serving() as server, server.post(path, body) as response:
        if response.status != 200:  # /tokenize takes an empty text
            check_answer(path, response.status, await response.json())


@pytest.mark.parametrize(
    ("path", "body", "kind"),
    [
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "a"}], "logprobs": True, "top_logprobs": 1},
            ChatChunk,
        ),
        ("/v1/completions", {"prompt": "a", "logprobs": 1}, CompletionChunk),
    ],
)
async def test_chunks_are_what_the_document_says(
    path: str, body: dict[str, Any], kind: type[ChatChunk | CompletionChunk]
) -> None:
    asked = body | {"stream": True, "stream_options": {"include_usage": True}}
    async with serving() as server, server.post(path, asked) as response:
        events = await events_of(response)
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    assert len(chunks) == 3
    for chunk in chunks:
        read = msgspec.convert(chunk, kind)
        assert msgspec.to_builtins(read) == chunk  # the schema knows every member


async def test_the_document_is_served_and_printed() -> None:
    async with serving() as server, server.http.get("/api-doc/openapi.json") as response:
        assert await response.json() == DOCUMENT


async def test_the_docs_page_loads_nothing_from_elsewhere() -> None:
    async with serving() as server:
        async with server.http.get("/docs", allow_redirects=False) as response:
            assert (response.status, response.headers["location"]) == (303, "/docs/")
        async with server.http.get("/docs/") as response:
            assert response.content_type == "text/html"
            assert "default-src 'self'" in response.headers["content-security-policy"]
            page = await response.text()
    assert "http://" not in page
    assert "https://" not in page
    assert "openapi.json" in page


@pytest.mark.parametrize(
    ("name", "status"),
    [
        ("swagger-ui-bundle.js", 200),
        ("swagger-ui.css", 200),
        ("favicon-16x16.png", 200),
        ("swagger-ui.js", 404),
        ("..%2f..%2f__init__.py", 404),
        ("VERSION", 404),
    ],
)
async def test_only_the_files_of_the_page_are_served(name: str, status: int) -> None:
    async with serving() as server, server.http.get(f"/docs/{name}") as response:
        assert response.status == status


def test_the_table_has_no_path_twice() -> None:
    pairs = [(route.method, route.path) for route in ROUTES]
    assert len(set(pairs)) == len(pairs)
