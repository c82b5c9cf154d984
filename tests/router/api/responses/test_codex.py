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
    assert all(f'"name": "{name}"' in prompt for name in ("shell", "apply_patch", "git__log"))
    assert "web_search" not in prompt


async def test_a_custom_tool_is_called_with_its_text() -> None:
    said = saying(called("apply_patch", input=PATCHED) + "\n" + called("git__log", command="x"))
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


async def test_functions_of_the_same_name_in_two_namespaces_are_told_apart() -> None:
    spaces = [{"type": "namespace", "name": one, "tools": [SHELL]} for one in ("here", "there")]
    async with serving_tools(saying(called("there__shell", command="ls"))) as server:
        (call,) = (await answer(server, **BODY | {"tools": [SHELL, *spaces]}))["output"]
        output = {"type": "function_call_output", "call_id": call["call_id"], "output": "a"}
        await answer(server, **BODY | {"tools": spaces, "input": [USER, call, output]})
    assert (call["name"], call["namespace"]) == ("shell", "there")
    assert '"name": "there__shell", "arguments"' in server.loop.requests[1].prompt_text


async def test_items_and_tools_that_the_model_cannot_see_are_named() -> None:
    inner = {"type": "namespace", "name": "a", "tools": [{"type": "namespace", "name": "b"}]}
    items = [USER, {"type": "mcp_call", "id": "m"}, {"type": "tool_search_call", "id": "t"}]
    async with (
        serving_tools(saying("Hi")) as server,
        server.post("/v1/responses", {"input": items, "tools": [inner, SHELL]}) as response,
    ):
        assert response.status == 200, await response.text()
        assert response.headers["x-left-out"] == (
            "tools[0].tools[0]: namespace, input[1]: mcp_call, input[2]: tool_search_call"
        )


async def test_a_custom_call_with_more_than_its_text_gives_the_text() -> None:
    said = (
        called("apply_patch", input="x")[: -len("}}\n</tool_call>")] + ', "more": 1}}\n</tool_call>'
    )
    async with serving_tools(saying(said)) as server:
        (item,) = (await answer(server, **BODY))["output"]
    assert item["input"] == "x"
