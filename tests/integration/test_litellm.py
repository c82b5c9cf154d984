"""litellm against the embedded model, in processes of its own: it leaves loops and sockets open."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest
from tests.integration.conftest import Server

pytestmark = pytest.mark.slow

MESSAGES = [{"role": "user", "content": "What is the capital of France? Answer in one word."}]
# Each prints one JSON value; `url` and `messages` are given.
COMPLETIONS = """
arguments = dict(model="openai/tgi", api_base=url + "/v1", api_key="-", max_tokens=12,
                 temperature=0, logit_bias={"5": -100}, stop="\\n", messages=messages)
whole = litellm.completion(**arguments)
chunks = litellm.completion(**arguments, stream=True)
try:
    litellm.completion(**arguments, top_p=7, num_retries=0)
except litellm.exceptions.BadRequestError as error:
    refused = str(error)
show(text=whole.choices[0].message.content, prompt_tokens=whole.usage.prompt_tokens,
     streamed="".join(chunk.choices[0].delta.content or "" for chunk in chunks), refused=refused)
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


def run(server: Server, script: str) -> dict[str, Any]:
    """What a script shows."""
    head = (
        "import json, litellm\n"
        f"url, messages = {server.url!r}, {MESSAGES!r}\n"
        "show = lambda **values: print('SHOWN', json.dumps(values))\n"
    )
    # Else it asks a server on the internet for its list of prices.
    environ = {**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
    command = [sys.executable, "-W", "ignore", "-c", head + script]
    process = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env=environ, check=False
    )
    assert process.returncode == 0, process.stderr[-3000:]
    (shown,) = [line for line in process.stdout.splitlines() if line.startswith("SHOWN ")]
    values: dict[str, Any] = json.loads(shown.removeprefix("SHOWN "))
    return values


def test_over_the_openai_routes(server: Server) -> None:
    shown = run(server, COMPLETIONS)
    assert "Paris" in shown["text"]
    assert shown["streamed"] == shown["text"]
    assert shown["prompt_tokens"] > 10
    assert "top_p" in shown["refused"]


def test_over_the_native_route(server: Server) -> None:
    assert "Paris" in run(server, NATIVE)["text"]


def test_over_the_responses_route(server: Server) -> None:
    shown = run(server, RESPONSES)
    assert "Paris" in shown["text"]
    assert shown["streamed"] == shown["text"]
