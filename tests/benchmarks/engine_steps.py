"""Steps of the engine alone, without router and client: how long a decode and a chunk take.

    python tests/benchmarks/engine_steps.py [FOLDER] [--quantize int8] [--rounds 3]

Without FOLDER it takes the embedded model, which the launcher must have converted once.
"""

import argparse
import os
import statistics
import time
from pathlib import Path
from typing import NamedTuple

import torch
from tests.integration.conftest import embedded_folder

from kagami_proto.values import SamplingParams
from kagami_shard import cli
from kagami_shard.backends.native.select import Native
from kagami_shard.backends.select import load_backend
from kagami_shard.engine.engine import Engine
from kagami_shard.engine.step import NewSequence, Step, WorkColumns
from kagami_shard.engine.warmup import WarmupLimits
from kagami_shard.machine.distributed import Alone

_BLOCK_SIZE = 32
_LIMITS = WarmupLimits(512, 64, 2048, 40_000)


class Shape(NamedTuple):
    """`num_sequences` sequences with `context` tokens in the cache compute `tokens` more each."""

    name: str
    num_sequences: int
    context: int
    tokens: int
    shared: int = 0
    """Tokens of the context that lie in blocks which all sequences share"""

    @property
    def num_steps(self) -> int:
        """A decode goes on from step to step, a chunk is computed again and again."""
        return 40 if self.tokens == 1 else 4

    def position(self, step: int) -> int:
        return self.context + (step if self.tokens == 1 else 0)


SHAPES = (
    Shape("decode 1 x 128", 1, 128, 1),
    Shape("decode 1 x 1024", 1, 1024, 1),
    Shape("decode 4 x 1024", 4, 1024, 1),
    Shape("decode 16 x 192", 16, 192, 1),
    Shape("decode 16 x 1100", 16, 1100, 1),
    Shape("decode 16 x 1100, 1024 shared", 16, 1100, 1, 1024),
    Shape("chunk 128 at 0", 1, 0, 128),
    Shape("chunk 256 at 0", 1, 0, 256),
    Shape("chunk 256 at 768", 1, 768, 256),
    Shape("chunk 512 at 0", 1, 0, 512),
    Shape("chunk 512 at 512", 1, 512, 512),
    Shape("chunk 4 x 128 at 0", 4, 0, 128),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", nargs="?")
    parser.add_argument("--quantize")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="", help="shapes whose name begins so")
    args = parser.parse_args()
    engine = _engine(Path(args.folder) if args.folder else embedded_folder(), args.quantize)
    for shape in SHAPES:
        if not shape.name.startswith(args.only):
            continue
        times = [_run(engine, shape) for _ in range(args.rounds)]
        median = statistics.median(times)
        rate = shape.num_sequences * shape.tokens / median
        print(f"{shape.name:30} {median * 1e3:8.2f} ms  {rate:8.0f} tokens/s", flush=True)


def _engine(folder: Path, quantize: str | None) -> Engine:
    backend, _ = load_backend(
        folder,
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
        trust_remote_code=False,
        max_length=_LIMITS.max_total_tokens,
        parallel=Alone(),
        quantize=quantize,
        memory_fraction=1.0,
        native=Native(cli.cache_folder(os.environ), torch.get_num_threads()),
    )
    engine = Engine(backend, block_size=_BLOCK_SIZE)
    engine.warmup(_LIMITS)
    print(f"backend: {backend.name}")
    return engine


def _run(engine: Engine, shape: Shape) -> float:
    """Seconds of one step, the median of some."""
    engine.reset()
    longest = shape.position(shape.num_steps - 1) + shape.tokens
    per_sequence = -(-(longest + 1) // _BLOCK_SIZE)
    # Each token of a decode is the last one known: its logits are computed and chosen from.
    length = shape.context + shape.tokens
    ids = [7 + i % 911 for i in range(length + (shape.tokens > 1))]
    sequences = [
        NewSequence(number, ids, len(ids), SamplingParams())
        for number in range(shape.num_sequences)
    ]
    num_shared = shape.shared // _BLOCK_SIZE
    prefix = list(range(1, 1 + num_shared))
    grants = {
        number: prefix + list(range(first, first + per_sequence - num_shared))
        for number in range(shape.num_sequences)
        for first in [1 + num_shared + number * per_sequence]
    }
    engine.collect(engine.launch(Step(0, new_sequences=sequences, grants=grants)))
    for begin in range(0, shape.context, 256):
        count = min(256, shape.context - begin)
        _step(engine, shape, begin, count)
    return statistics.median(
        _step(engine, shape, shape.position(step), shape.tokens) for step in range(shape.num_steps)
    )


def _step(engine: Engine, shape: Shape, position: int, count: int) -> float:
    size = shape.num_sequences
    work = WorkColumns(list(range(size)), [position] * size, [count] * size)
    started = time.perf_counter()
    engine.collect(engine.launch(Step(1, work=work)))
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
