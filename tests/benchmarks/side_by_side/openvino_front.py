"""The little of /v1/completions that a measurement needs, in front of `openvino_engine.py`.

OpenVINO GenAI is a library, so somebody has to serve it. This does as little as it can, in the
peer's favour: one token is one event, decoded alone. Run by the peer's own python.
"""

import argparse
import asyncio
import itertools
import json
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from aiohttp import web
from tokenizers import Tokenizer

ENGINE = Path(__file__).with_name("openvino_engine.py")
LINE_LIMIT = 1 << 20


class Engine:
    """The engine's process, and the answers that are on their way."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process
        self._numbers = itertools.count(1)
        self._answers: dict[int, asyncio.Queue[tuple[list[int], bool]]] = {}

    async def read(self) -> None:
        """Give the engine's lines to those who wait for them, until it ends."""
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            for number, ids, is_done in json.loads(line):
                self._answers[number].put_nowait((ids, is_done))

    async def generate(
        self, ids: list[int], max_new_tokens: int, ignore_eos: bool
    ) -> AsyncIterator[int]:
        """The new tokens of one prompt."""
        assert self._process.stdin is not None
        number = next(self._numbers)
        queue = self._answers[number] = asyncio.Queue()
        request = {"id": number, "ids": ids, "max_new_tokens": max_new_tokens}
        line = json.dumps(request | {"ignore_eos": ignore_eos}) + "\n"
        self._process.stdin.write(line.encode())
        is_done = False
        while not is_done:
            new, is_done = await queue.get()
            for token in new:
                yield token
        # Only now: the engine sends to the end, whether or not the client still listens.
        del self._answers[number]


class CompletionsRoute:
    """The one route."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer) -> None:
        self._engine = engine
        self._tokenizer = tokenizer

    async def completions(self, request: web.Request) -> web.StreamResponse:
        """A stream where it is asked for, else one answer."""
        body = await request.json()
        prompt = body["prompt"]
        ids = self._tokenizer.encode(prompt).ids if isinstance(prompt, str) else prompt
        tokens = self._engine.generate(ids, body["max_tokens"], bool(body.get("ignore_eos")))
        if not body.get("stream"):
            made = [token async for token in tokens]
            text = self._tokenizer.decode(made)
            return web.json_response({"choices": [{"text": text}], "usage": _usage(ids, len(made))})
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        count = 0
        async for token in tokens:
            count += 1
            text = self._tokenizer.decode([token])
            await response.write(_event({"choices": [{"index": 0, "text": text}]}))
        await response.write(_event({"choices": [], "usage": _usage(ids, count)}))
        await response.write(b"data: [DONE]\n\n")
        return response


def _usage(ids: list[int], count: int) -> dict[str, int]:
    return {"prompt_tokens": len(ids), "completion_tokens": count, "total_tokens": len(ids) + count}


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


async def serve(folder: Path, port: int, num_threads: int) -> None:
    """Start the engine, then listen until the engine ends."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, str(ENGINE), str(folder), "--threads", str(num_threads)),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        limit=LINE_LIMIT,
    )
    assert process.stdout is not None
    if not await process.stdout.readline():
        raise SystemExit(f"the engine ended with {await process.wait()}")
    engine = Engine(process)
    route = CompletionsRoute(engine, Tokenizer.from_file(str(folder / "tokenizer.json")))
    app = web.Application()
    app.router.add_post("/v1/completions", route.completions)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port).start()
    await engine.read()


def main() -> None:
    """Parse and serve."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    args = parser.parse_args()
    asyncio.run(serve(args.folder, args.port, args.threads))


if __name__ == "__main__":
    main()
