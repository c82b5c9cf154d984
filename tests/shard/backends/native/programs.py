"""Programs in the verbs of `Ops`, and whether the library computes what torch does.

`TorchOps` computes a program in float32, the library from the same values, all of which bf16 can
hold. What it brings comes out through a head that copies.
"""

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from tests.fakes.batches import FakeSequence, build_batch
from torch import Tensor

from kagami_shard.backends.native.model import replay_into
from kagami_shard.backends.native.page_tables import PageTables
from kagami_shard.backends.native.recorder import record
from kagami_shard.backends.native.runtime import Runtime
from kagami_shard.backends.torch.ops import TorchOps
from kagami_shard.backends.torch.sdpa import SdpaAttention
from kagami_shard.forward.batch import ForwardBatch
from kagami_shard.forward.kv_cache import KVCache, LayerShape
from kagami_shard.layers.embedding import Embedding, Head
from kagami_shard.layers.linear import Linear
from kagami_shard.layers.norm import Rounding
from kagami_shard.layers.rotary import RopeSpec, RotaryEmbedding
from kagami_shard.models.ops import Ops, T

CPU = torch.device("cpu")
BLOCK_SIZE = 4
ARRANGED = 32
"""A size of blocks that the library arranges, where heads are as many dimensions wide"""
# Of the largest value: a few roundings to bf16.
NEAR = 0.02

quick = settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
sizes = st.integers(1, 70)
# With tiles: one pass of rows, three that overlap, and so many that each thread has its own.
lengths = st.integers(1, 40) | st.sampled_from([67, 259])
seeds = st.integers(0, 99)


class Weights:
    """Random values that bf16 can hold, the same for every dtype."""

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self.dtype = dtype

    def vector(self, size: int) -> Tensor:
        return self.matrix(1, size)[0]

    def matrix(self, rows: int, columns: int, scale: float = 1.0) -> Tensor:
        values = torch.randn((rows, columns), generator=self._generator) * scale
        return values.bfloat16().to(self.dtype)

    def linear(self, rows: int, columns: int, *, bias: bool = True) -> Linear:
        weight = self.matrix(rows, columns, columns**-0.5)
        return Linear(weight, self.vector(rows) if bias else None)


class Program:
    """A body of verbs between an embedding of `width` columns and the logits."""

    def __init__(
        self,
        weights: Weights,
        width: int,
        body: Callable[[Ops[Any], Any], Any],
        *,
        head: Head | None = None,
        multiplier: float = 1.0,
        rope: RopeSpec | None = None,
        heads: LayerShape = LayerShape(1, 2, 2),  # noqa: B008
        body_selects: bool = False,
    ) -> None:
        """Rows without logits leave it in the body, or else at its end."""
        self.embedding = Embedding(weights.matrix(64, width), multiplier)
        self._round = Rounding(weights.dtype)
        self._body = body
        self._body_selects = body_selects
        self._head = head
        self._width = width
        self._dtype = weights.dtype
        self.ropes = [] if rope is None else [RotaryEmbedding(rope, CPU)]
        self.heads = heads

    def run(self, ops: Ops[T]) -> T:
        hidden = self._body(ops, ops.embed(self.embedding))
        if not self._body_selects:
            (hidden,) = ops.select_rows(hidden)
        head = self._head or Head(Linear(torch.eye(self._width, dtype=self._dtype)), self._width)
        return ops.logits(ops.norm(hidden, self._round), head)


Make = Callable[[Weights], Program]


def prompt(count: int) -> ForwardBatch:
    """A prompt of `count` tokens."""
    blocks = list(range(1, 2 + count // BLOCK_SIZE))
    sequence = FakeSequence([7 * i % 64 for i in range(count)], blocks)
    return build_batch([(sequence, count)], BLOCK_SIZE, all_rows=True)


def is_near(
    runtime: Runtime,
    make: Make,
    seed: int,
    *batches: ForwardBatch,
    block_size: int = BLOCK_SIZE,
    near: float = NEAR,
    size: float = 1.0,
    steps: float = 0.0,
) -> bool:
    """Whether the library's steps bring what torch's bring, each on a cache of its own.

    They may differ by `near` of the largest value, or of `size` where that is more, and by `steps`.
    """
    exact, rounded = (make(Weights(seed, t)) for t in (torch.float32, torch.bfloat16))
    tape = record(rounded, runtime)
    caches = [
        KVCache([exact.heads], 256, block_size, dtype=dtype, device=CPU)
        for dtype in (torch.float32, torch.bfloat16)
    ]
    for batch in batches:
        step = SdpaAttention().prepare(batch, caches[0])
        expected = exact.run(TorchOps(batch, step, exact.ropes))
        ours = torch.full_like(expected, float("nan"))
        replay_into(tape, batch, PageTables(caches[1]), ours)
        allowed = near * expected.abs().max().clamp(min=size) + steps
        if not (ours - expected).abs().max() <= allowed:
            return False
    return True
