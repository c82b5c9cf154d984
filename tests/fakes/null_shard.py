"""A shard that computes nothing: the real protocol, and tokens for free.

    python tests/fakes/null_shard.py SOCKET --step-ms 20

What a server with it costs is the router's own cost. The tokens are the same few for every
sequence; `--step-ms` is how long a step pretends to take (default: no time at all).
"""

import argparse
import asyncio
import signal
import time
from collections.abc import AsyncIterator, Sequence
from typing import Self

import grpc.aio

from kagami_proto import generate_pb2 as pb
from kagami_proto import generate_pb2_grpc
from kagami_proto.values import DEVICE_POLICIES
from kagami_proto.wire import policy_to_pb

BLOCK_SIZE = 16
# Any ids do that are words of a BPE vocabulary; 1,000 to 1,063 are in every one.
TOKENS = tuple(range(1000, 1064))


class NullShard(generate_pb2_grpc.TextGenerationServiceServicer):
    """The protocol of generate.proto with nothing behind it; an async context manager."""

    def __init__(
        self,
        path: str,
        *,
        tokens: Sequence[int] = TOKENS,
        vocab_size: int = 32_000,
        step_s: float = 0.0,
        num_blocks: int = 65_536,
    ) -> None:
        self._address = f"unix://{path}"
        self._tokens = tokens
        self._vocab_size = vocab_size
        self._step_s = step_s
        self._num_blocks = num_blocks
        self._server: grpc.aio.Server | None = None

    async def __aenter__(self) -> Self:
        self._server = grpc.aio.server()
        generate_pb2_grpc.add_TextGenerationServiceServicer_to_server(self, self._server)
        self._server.add_insecure_port(self._address)
        await self._server.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        await self._server.stop(grace=None)

    async def Info(self, request: pb.InfoRequest, context: object) -> pb.InfoResponse:
        return pb.InfoResponse(
            model_type="null",
            dtype="torch.bfloat16",
            device_type="cpu",
            attention="none",
            vocab_size=self._vocab_size,
            max_positions=8192,
            block_size=BLOCK_SIZE,
            world_size=1,
            version="0",
            policy=policy_to_pb(DEVICE_POLICIES["cpu"]),
        )

    async def Health(self, request: pb.HealthRequest, context: object) -> pb.HealthResponse:
        return pb.HealthResponse()

    async def Warmup(self, request: pb.WarmupRequest, context: object) -> pb.WarmupResponse:
        return pb.WarmupResponse(num_blocks=self._num_blocks, block_size=BLOCK_SIZE, kv_bytes=1)

    async def CompileGrammar(
        self, request: pb.Grammar, context: object
    ) -> pb.CompileGrammarResponse:
        return pb.CompileGrammarResponse(error="the null shard knows no grammars")

    async def Run(
        self, request_iterator: AsyncIterator[pb.Step], context: object
    ) -> AsyncIterator[pb.StepResult]:
        free_at = 0.0
        async for step in request_iterator:
            if self._step_s:  # steps run one behind the other, as on a device
                free_at = max(free_at, time.monotonic()) + self._step_s
                await asyncio.sleep(free_at - time.monotonic())
            yield self._run(step)

    def _run(self, step: pb.Step) -> pb.StepResult:
        sampled = list(step.ids)
        if step.wanted:
            pairs = zip(step.ids, step.wanted, strict=True)
            sampled = [one for one, wanted in pairs if wanted == pb.ONE_TOKEN]
        token = self._tokens[step.number % len(self._tokens)]
        logprob = -0.1 - step.number % 1000 / 777  # as many digits as real ones have
        return pb.StepResult(
            number=step.number,
            ids=sampled,
            token_ids=[token] * len(sampled),
            logprobs=[logprob] * len(sampled),
            device_ns=int(self._step_s * 1e9),
        )


async def serve(path: str, step_s: float, vocab_size: int) -> None:
    """Until SIGTERM or SIGINT."""
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with NullShard(path, vocab_size=vocab_size, step_s=step_s):
        await stop.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("socket", help="path of the Unix socket")
    parser.add_argument("--step-ms", type=float, default=0.0, help="how long a step takes")
    parser.add_argument("--vocab-size", type=int, default=32_000)
    args = parser.parse_args()
    asyncio.run(serve(args.socket, args.step_ms / 1000, args.vocab_size))


if __name__ == "__main__":
    main()
