"""Coding agents, unmodified, over a small task: they make a file with a tool and read its output.

They are looked for in PATH and in ~/.cache/kagami-clients/node_modules/.bin, where
`npm install --prefix ~/.cache/kagami-clients @anthropic-ai/claude-code @openai/codex` puts them.
The model is a script; router, HTTP and agents are real.
"""

import asyncio
import json
import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from tests.fakes.fake_loop import FakeLoop, step_events_of
from tests.fakes.fake_server import EOS, TEMPLATE, TOKENS, serving
from tests.router.api.openai.test_chat_tools import WIDE, compiles

from kagami_router.request.values import FinishReason, Token
from kagami_router.text.chat_template import ChatTemplate

pytestmark = pytest.mark.slow

_FOLDER = Path("~/.cache/kagami-clients/node_modules/.bin").expanduser()
_SECONDS = 120
CONFIG = """model = "kagami"
model_provider = "kagami"
[model_providers.kagami]
name = "Kagami"
base_url = "{url}/v1"
wire_api = "responses"
"""


def found(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}{os.pathsep}{_FOLDER}")


def titled(name: str) -> str:
    """The name of an agent with its version."""
    if (program := found(name)) is None:
        return f"{name}-missing"
    told = subprocess.run([program, "--version"], capture_output=True, text=True, check=False)
    return f"{name}-{''.join(part for part in told.stdout.split() if part[:1].isdigit())}"


def scripted(tool: str, arguments: Mapping[str, str]) -> FakeLoop:
    """A model that calls a tool once, and then says that it is done."""
    call = json.dumps({"name": tool, "arguments": arguments})

    def answer(prompt: str) -> str:
        if "<tool_response>" in prompt:
            return "All done."
        return f"<tool_call>\n{call}\n</tool_call>" if f'"{tool}"' in prompt else "A title"

    def events(request: object) -> list[object]:
        text = answer(request.prompt_text)  # type: ignore[attr-defined]
        pieces = [text[at : at + 5] for at in range(0, len(text), 5)]
        tokens = [Token(number, piece, -0.5, False) for number, piece in enumerate(pieces)]
        return [*step_events_of([*tokens, EOS], FinishReason.EOS_TOKEN)]

    return FakeLoop(events)


@pytest.mark.parametrize("agent", ["claude", "codex"], ids=titled)
async def test_an_agent_makes_a_file(agent: str, tmp_path: Path) -> None:
    program = found(agent)
    if program is None:
        pytest.skip(f"{agent} is neither in PATH nor in {_FOLDER}")
    home, work = tmp_path / "home", tmp_path / "work"
    (home / ".codex").mkdir(parents=True)
    work.mkdir()
    command = "echo made by an agent > made.txt && cat made.txt"
    loop = (
        scripted("Bash", {"command": command, "description": "make a file"})
        if agent == "claude"
        else scripted("exec_command", {"cmd": command})
    )
    asked = ["-p", "make made.txt", "--dangerously-skip-permissions"]
    if agent == "codex":
        free = "--dangerously-bypass-approvals-and-sandbox"
        asked = ["exec", "--skip-git-repo-check", free, "make made.txt"]
    # A system prompt of an agent is long, and here a token is one byte.
    limits = replace(WIDE, max_input_tokens=1_000_000, max_total_tokens=1_050_000)
    template = ChatTemplate("{{ tools | tojson }}<tool_call>" + TEMPLATE, TOKENS)
    options = {"limits": limits, "compile_grammar": compiles, "template": template}
    async with serving(loop, payload_limit=20_000_000, **options) as server:
        (home / ".codex" / "config.toml").write_text(CONFIG.format(url=server.url))
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(home),
            "ANTHROPIC_BASE_URL": server.url,
            "ANTHROPIC_AUTH_TOKEN": "k",
            "ANTHROPIC_MODEL": "kagami",
            "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
            "IS_SANDBOX": "1",
        }
        process = await asyncio.create_subprocess_exec(
            program,
            *asked,
            cwd=work,
            env=environment,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        output, _ = await asyncio.wait_for(process.communicate(), _SECONDS)
    assert process.returncode == 0, output.decode()
    assert (work / "made.txt").read_text() == "made by an agent\n"
    assert "All done." in output.decode()
    # The second request repeats the whole prompt of the first one: the prefix cache has it.
    first, *_, second = (
        one.prompt_text for one in server.loop.requests if "made.txt" in one.prompt_text
    )
    same = next(
        (at for at, pair in enumerate(zip(first, second, strict=False)) if len(set(pair)) > 1), None
    )
    assert same is None or same > 0.99 * len(first)
