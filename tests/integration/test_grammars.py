"""Structured output with the embedded model and its real vocabulary."""

import asyncio
import json
import re
from typing import Any

import aiohttp
import jsonschema
import pytest
from openai import AsyncOpenAI
from tests.integration.conftest import Server

pytestmark = pytest.mark.slow

ORDER = {
    "type": "object",
    "properties": {
        "size": {"enum": ["small", "large"]},
        "count": {"type": "integer", "minimum": 1, "maximum": 40},
        "paid": {"type": "boolean"},
        "toppings": {"type": "array", "items": {"$ref": "#/$defs/topping"}, "maxItems": 2},
    },
    "required": ["size", "count", "paid", "toppings"],
    "$defs": {
        "topping": {
            "type": "object",
            "properties": {"name": {"type": "string", "maxLength": 12}},
            "required": ["name"],
        }
    },
}
PROMPT = "An order for pizza as JSON: "
DNS = r"((25[0-5]|2[0-4]\d|[01]?\d\d?)\.){3}(25[0-5]|2[0-4]\d|[01]?\d\d?)"


async def generate(url: str, inputs: str = PROMPT, **parameters: Any) -> tuple[int, Any]:
    body = {"inputs": inputs, "parameters": {"details": True, **parameters}}
    async with (
        aiohttp.ClientSession(url) as http,
        http.post("/generate", json=body) as answer,
    ):
        return answer.status, await answer.json()


def grammar(schema: object) -> dict[str, object]:
    return {"type": "json", "value": schema}


async def test_json_at_temperature_1_always_fits_its_schema(bf16_server: Server) -> None:
    answers = await asyncio.gather(
        *(
            generate(
                bf16_server.url,
                max_new_tokens=150,
                do_sample=True,
                seed=seed,
                grammar=grammar(ORDER),
            )
            for seed in range(24)
        )
    )
    for status, answer in answers:
        assert status == 200
        assert answer["details"]["finish_reason"] == "eos_token"
        jsonschema.validate(json.loads(answer["generated_text"]), ORDER)
    assert len({answer["generated_text"] for _, answer in answers}) > 12


async def test_what_is_cut_says_so(bf16_server: Server) -> None:
    _, answer = await generate(bf16_server.url, max_new_tokens=5, grammar=grammar(ORDER))
    assert answer["details"]["finish_reason"] == "length"


async def test_a_regular_expression_is_matched_whole(bf16_server: Server) -> None:
    _, answer = await generate(
        bf16_server.url,
        "Whats Googles DNS? ",
        max_new_tokens=20,
        grammar={"type": "regex", "value": DNS},
        ignore_eos=True,
    )
    assert answer["details"]["finish_reason"] == "eos_token"
    assert re.fullmatch(DNS, answer["generated_text"])


async def test_constrained_and_free_requests_share_batches(server: Server) -> None:
    schemas = [{**ORDER, "title": f"order {n}"} for n in range(8)]
    alone = await generate(server.url, "Once upon a time", max_new_tokens=30)
    answers = await asyncio.gather(
        *(generate(server.url, max_new_tokens=120, grammar=grammar(one)) for one in schemas),
        *(generate(server.url, "Once upon a time", max_new_tokens=30) for _ in range(8)),
    )
    for _, answer in answers[:8]:
        jsonschema.validate(json.loads(answer["generated_text"]), ORDER)
    for _, answer in answers[8:]:
        assert answer["generated_text"] == alone[1]["generated_text"]


async def test_a_bad_grammar_is_refused_before_anything_is_generated(bf16_server: Server) -> None:
    for bad in ({"type": "regex", "value": "(a"}, grammar({"type": "pizza"}), grammar("{")):
        status, answer = await generate(bf16_server.url, grammar=bad)
        assert status == 422
        assert answer["error"].startswith("Input validation error: grammar is not valid: ")


async def test_a_stream_goes_on_while_grammars_are_compiled(bf16_server: Server) -> None:
    """Beside a stream, grammars are compiled for 0.2 s each and then found to be too large."""
    heavy = [
        {
            "type": "object",
            "properties": {
                f"p{n}": {"type": "string", "pattern": f"^[a-z]{{1,{n % 90 + round_ + 1}}}$"}
                for n in range(1200)
            },
        }
        for round_ in range(8)
    ]
    num_tokens = 0
    has_begun = asyncio.Event()

    async def read_stream() -> None:
        nonlocal num_tokens
        body = {"inputs": "Once", "parameters": {"max_new_tokens": 400, "ignore_eos": True}}
        async with (
            aiohttp.ClientSession(bf16_server.url) as http,
            http.post("/generate_stream", json=body) as answer,
        ):
            async for line in answer.content:
                if line.startswith(b"data:"):
                    num_tokens += 1
                    has_begun.set()

    reading = asyncio.ensure_future(read_stream())
    await has_begun.wait()
    before = num_tokens
    answers = await asyncio.gather(
        *(generate(bf16_server.url, grammar=grammar(one)) for one in heavy)
    )
    during = num_tokens - before
    reading.cancel()
    assert [status for status, _ in answers] == [422] * len(heavy)
    assert "items" in answers[0][1]["error"]
    assert during > len(heavy)  # more than could slip in between two that hold everything up


async def test_a_schema_in_a_chat_as_openai_writes_it(bf16_server: Server) -> None:
    client = AsyncOpenAI(base_url=f"{bf16_server.url}/v1", api_key="-")
    answer = await client.chat.completions.create(
        model="tgi",
        messages=[{"role": "user", "content": "Order a pizza."}],
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "order", "schema": ORDER, "strict": True},
        },
        max_tokens=150,
        seed=1,
    )
    assert answer.choices[0].finish_reason == "stop"
    jsonschema.validate(json.loads(answer.choices[0].message.content or ""), ORDER)
    await client.close()
