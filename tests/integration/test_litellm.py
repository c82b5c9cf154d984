"""litellm against the embedded model, in a process of its own: it leaves loops and sockets open."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest
from tests.integration.conftest import Server

pytestmark = pytest.mark.slow

MESSAGES = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]
# Each shows one JSON value; `url` and `messages` are given. One process runs all: importing litellm
# takes it four seconds.
COMPLETIONS = """
arguments = dict(model="openai/tgi", api_base=url + "/v1", api_key="-", max_tokens=12,
                 temperature=0, logit_bias={"5": -100}, stop="\\n", messages=messages)
whole = litellm.completion(**arguments)
chunks = litellm.completion(**arguments, stream=True)
try:
    litellm.completion(**arguments, top_p=7, num_retries=0)
except litellm.exceptions.BadRequestError as error:
    refused = str(error)
full = 0
for model, base in (("openai/tgi", url + "/v1"), ("anthropic/tgi", url)):
    try:
        litellm.completion(model=model, api_base=base, api_key="-", num_retries=0, max_tokens=12,
                           messages=[dict(role="user", content="word " * 20_000)])
    except litellm.exceptions.ContextWindowExceededError:
        full += 1
show(text=whole.choices[0].message.content, prompt_tokens=whole.usage.prompt_tokens,
     streamed="".join(chunk.choices[0].delta.content or "" for chunk in chunks), refused=refused,
     full=full)
"""
NATIVE = """
answer = litellm.completion(model="huggingface/tgi", api_base=url, api_key="-", max_tokens=12,
                            temperature=0, messages=messages)
show(text=answer.choices[0].message.content)
"""
# A name that litellm knows: for others it makes the stream up itself.
RESPONSES = """
arguments = dict(model="openai/gpt-4o", api_base=url + "/v1", api_key="-", temperature=0,
                 max_output_tokens=12, input=messages[0]["content"])
whole = litellm.responses(**arguments)
events = litellm.responses(**arguments, stream=True)
show(text=whole.output[0].content[0].text,
     streamed="".join(event.delta for event in events
                      if event.type == "response.output_text.delta"))
"""


RUNNER = """
import json, sys, traceback
import litellm
given = json.load(sys.stdin)
for name, script in given["scripts"].items():
    show = lambda **values: print("SHOWN", json.dumps({name: values}))
    try:
        exec(script, {"litellm": litellm, "show": show, **given})
    except Exception:
        show(traceback=traceback.format_exc())
"""
SCRIPTS = {"completions": COMPLETIONS, "native": NATIVE, "responses": RESPONSES}


@pytest.fixture(scope="module")
def shown(server: Server) -> dict[str, dict[str, Any]]:
    """What each script shows; one that failed has a `traceback` instead."""
    # Without this it asks a server on the internet for its list of prices.
    environ = {**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    process = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", RUNNER],
        input=json.dumps({"url": server.url, "messages": MESSAGES, "scripts": SCRIPTS}),
        capture_output=True,
        text=True,
        timeout=120,
        env=environ,
        check=False,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    marked = [line for line in process.stdout.splitlines() if line.startswith("SHOWN ")]
    return {name: values for line in marked for name, values in json.loads(line[6:]).items()}


def test_over_the_openai_routes(shown: dict[str, dict[str, Any]]) -> None:
    values = shown["completions"]
    assert "traceback" not in values
    assert values["full"] == 2
    assert "Paris" in values["text"]
    assert values["streamed"] == values["text"]
    assert values["prompt_tokens"] > 10
    assert "top_p" in values["refused"]


def test_over_the_native_route(shown: dict[str, dict[str, Any]]) -> None:
    values = shown["native"]
    assert "traceback" not in values
    assert "Paris" in values["text"]


def test_over_the_responses_route(shown: dict[str, dict[str, Any]]) -> None:
    values = shown["responses"]
    assert "traceback" not in values
    assert "Paris" in values["text"]
    assert values["streamed"] == values["text"]
