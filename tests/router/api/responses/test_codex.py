"""What Codex's command line sends to /v1/responses, and what it reads."""

import json
from typing import Any

from tests.router.api.openai.test_chat_tools import serving_tools
from tests.router.api.responses.test_responses import USER, answer, events, saying

from kagami_router.request.values import FinishReason

SHELL = {
    "type": "function",
    "name": "shell",
    "strict": False,
    "parameters": {"type": "object", "properties": {"command": {"type": "string"}}},
}
PATCH = {
    "type": "custom",
    "name": "apply_patch",
    "description": "Edits files.",
    "format": {"type": "grammar", "syntax": "lark", "definition": "start: /.+/"},
}
BODY: dict[str, Any] = {
    "model": "m",
    "instructions": "You are a coding agent.",
    "tools": [
        SHELL,
        PATCH,
        {"type": "namespace", "name": "git", "tools": [SHELL | {"name": "log"}]},
        {"type": "web_search", "external_web_access": False},
        {"type": "local_shell"},
        {"type": "image_generation"},
    ],
    "tool_choice": "auto",
    "parallel_tool_calls": True,
    "reasoning": {"effort": "medium", "summary": "auto"},
    "store": False,
    "include": ["reasoning.encrypted_content"],
    "prompt_cache_key": "k",
    "client_metadata": {"x": "y"},
    "service_tier": "auto",
}
PATCHED = "*** Begin Patch\n+é\n*** End Patch"


def called(name: str, **arguments: str) -> str:
    said = json.dumps({"name": name, "arguments": arguments})
    return f"<tool_call>\n{said}\n</tool_call>"


async def test_tools_are_offered_where_they_can_be_and_the_rest_is_named() -> None:
    async with (
        serving_tools(saying("Hi")) as server,
        server.post("/v1/responses", BODY | {"input": [USER]}) as response,
    ):
        assert response.status == 200, await response.text()
        left_out = response.headers["x-left-out"]
    assert left_out == "tools[3]: web_search, tools[4]: local_shell, tools[5]: image_generation"
    prompt = server.loop.requests[0].prompt_text
    assert all(f'"name": "{name}"' in prompt for name in ("shell", "apply_patch", "log"))
    assert "web_search" not in prompt


async def test_a_custom_tool_is_called_with_its_text() -> None:
    said = saying(called("apply_patch", input=PATCHED) + "\n" + called("log", command="x"))
    async with serving_tools(said) as server:
        whole = await answer(server, **BODY)
        read = await events(server, **BODY)
    patch, log = whole["output"]
    assert (patch["type"], patch["name"]) == ("custom_tool_call", "apply_patch")
    assert patch["input"] == PATCHED
    assert patch["id"].startswith("ctc_")
    assert (log["type"], log["name"], log["namespace"]) == ("function_call", "log", "git")
    deltas = [one for one in read if one["type"] == "response.custom_tool_call_input.delta"]
    done = [one for one in read if one["type"] == "response.custom_tool_call_input.done"]
    assert "".join(one["delta"] for one in deltas) == PATCHED
    assert [one["input"] for one in done] == [PATCHED]
    assert read[-1]["response"]["output"][0]["input"] == PATCHED


async def test_a_custom_call_that_is_cut_shows_what_was_written() -> None:
    cut = called("apply_patch", input=PATCHED)[:70]
    async with serving_tools(saying(cut, FinishReason.LENGTH)) as server:
        (item,) = (await answer(server, **BODY))["output"]
    assert item["status"] == "incomplete"
    assert item["input"].startswith('{"input": "')


async def test_items_of_earlier_turns_come_back() -> None:
    history = [
        USER,
        {"type": "custom_tool_call", "call_id": "c1", "name": "apply_patch", "input": PATCHED},
        {"type": "custom_tool_call_output", "call_id": "c1", "output": "Done!"},
        {"type": "web_search_call", "id": "ws_1", "status": "completed", "action": {}},
        {
            "type": "local_shell_call",
            "call_id": "c2",
            "status": "completed",
            "action": {"type": "exec", "command": ["ls"]},
        },
        {"type": "local_shell_call_output", "call_id": "c2", "output": "a.py"},
    ]
    async with serving_tools(saying("Hi")) as server:
        await answer(server, **BODY | {"input": history})
    prompt = server.loop.requests[0].prompt_text
    for part in ("apply_patch", "Begin Patch", "Done!", "local_shell", '"ls"', "a.py"):
        assert part in prompt
