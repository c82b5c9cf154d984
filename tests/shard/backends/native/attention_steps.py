"""Layers that attend, and steps in which they do: chunks, decodes, shared prefixes."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from tests.fakes.batches import FakeSequence, build_batch
from tests.shard.backends.native.programs import BLOCK_SIZE, Program, Weights

from kagami_shard.forward.batch import ForwardBatch
from kagami_shard.forward.kv_cache import LayerShape
from kagami_shard.layers.attention import AttentionSpec
from kagami_shard.layers.embedding import Head
from kagami_shard.layers.linear import Linear
from kagami_shard.layers.mlp import ACTIVATIONS, GatedMLP
from kagami_shard.layers.norm import FullNorm, RMSNorm, no_norm
from kagami_shard.layers.rotary import RopeSpec
from kagami_shard.models.ops import Ops, SelfAttention

MIXED = [(5, 1), (0, 1), (13, 1), (0, 37), (6, 5), (34, 4)]
WIDE = [(5, 1), (0, 1), (31, 1), (32, 1), (70, 1), (0, 37), (31, 33), (64, 70), (190, 5)]
ROOT, LONG, SHORT = ("root", 160), ("long", 160), ("short", 32)
TREES = {
    "all of two share": [[ROOT, ("x", 3)], [ROOT, ("y", 1)]],
    "one ends where others go on": [[("x", 9)], [ROOT], [ROOT, ("y", 5)], [ROOT, ("z", 4)]],
    "a branch shares more": [
        [ROOT, LONG, ("x", 2)],
        [ROOT, ("y", 70)],
        [ROOT, LONG, ("z", 70)],
        [("alone", 21)],
        [ROOT, LONG, SHORT, ("v", 2)],
        [ROOT, LONG, SHORT, ("w", 3)],
    ],
    "a short root, a long branch": [
        [SHORT, ("x", 5)],
        [SHORT, LONG, ("y", 3)],
        [SHORT, LONG, ("z", 6)],
    ],
    "more than attend together": [[ROOT, (f"own {i}", 1 + i % 5)] for i in range(23)],
}


@dataclass(frozen=True)
class Case:
    """A layer's attention."""

    num_kv_heads: int = 2
    group: int = 3
    dim: int = 16
    rotary: int = 16
    window: int | None = None
    softcap: float | None = None
    qk_norm: str = "none"

    @property
    def num_heads(self) -> int:
        return self.num_kv_heads * self.group

    @property
    def width(self) -> int:
        return (self.num_heads + 2 * self.num_kv_heads) * self.dim

    def norm(self, weights: Weights) -> Any:
        num_heads, num_kv_heads, dim = self.num_heads, self.num_kv_heads, self.dim
        match self.qk_norm:
            case "heads":
                return RMSNorm(weights.matrix(num_heads + num_kv_heads, dim), 1e-5)
            case "all":
                of_query = RMSNorm(weights.vector(num_heads * dim), 1e-5)
                return FullNorm(
                    num_heads, of_query, RMSNorm(weights.vector(num_kv_heads * dim), 1e-5)
                )
            case _:
                return no_norm

    def program(
        self, weights: Weights, head: Head | None = None, output: Linear | None = None
    ) -> Program:
        spec = AttentionSpec(0, self.dim**-0.5, window=self.window, softcap=self.softcap)
        attention = SelfAttention(
            self.num_heads, self.num_kv_heads, self.dim, 0, self.norm(weights), spec
        )
        output = output or weights.linear(self.width, self.num_heads * self.dim, bias=False)

        def body(ops: Ops[Any], hidden: Any) -> Any:
            (queries,) = ops.select_rows(ops.write(hidden, attention))
            return ops.linear(ops.attend(queries, attention), output)

        return Program(
            weights,
            self.width,
            body,
            head=head,
            rope=RopeSpec(self.rotary, 1e4, 64, 64),
            heads=LayerShape(self.num_kv_heads, self.dim, self.dim),
            body_selects=True,
        )


def steps_of(
    work: Sequence[tuple[int, int]],
    seed: int,
    block_size: int = BLOCK_SIZE,
    *,
    num_rows: int | None = None,
) -> list[ForwardBatch]:
    """Prompts of so many tokens, then as many more of each; single tokens come first.

    Of these logits are asked for after all, or after `num_rows` by chance.
    """
    work = sorted(work, key=lambda each: each[1] > 1)
    blocks = list(range(1, 64))
    random.Random(seed).shuffle(blocks)
    sequences = []
    for before, new in work:
        count = -(-(before + new) // block_size)
        tokens = [(11 * i + before) % 64 for i in range(before + new)]
        sequences.append(FakeSequence(tokens, [blocks.pop() for _ in range(count)]))
    batches = []
    for sequence, (before, _) in zip(sequences, work, strict=True):
        if before:
            batches.append(build_batch([(sequence, before)], block_size, all_rows=True))
            sequence.computed = before
    mixed = [(sequence, new) for sequence, (_, new) in zip(sequences, work, strict=True)]
    rows = list(range(sum(new for _, new in work)))
    if num_rows is not None:
        rows = shuffled_runs(rows, num_rows, random.Random(seed))
    batches.append(build_batch(mixed, block_size, rows=rows))
    return batches


def shuffled_runs(rows: list[int], num_rows: int, generator: random.Random) -> list[int]:
    """Some of the rows, cut into a few pieces that change places."""
    chosen = sorted(generator.sample(rows, min(num_rows, len(rows))))
    cuts = sorted(generator.choices(range(len(chosen) + 1), k=3))
    pieces = [chosen[begin:end] for begin, end in pairwise([0, *cuts, len(chosen)])]
    generator.shuffle(pieces)
    return [row for piece in pieces for row in piece]


def branching(
    paths: Sequence[Sequence[tuple[str, int]]],
    *chunks: tuple[int, int],
    block_size: int = BLOCK_SIZE,
) -> list[ForwardBatch]:
    """A decode at the end of each path, and beside them chunks: so many tokens before, so many new.

    A path is stretches of so many tokens; paths share those that they begin with.
    """
    free = iter(range(64, 256))
    known: dict[tuple[str, ...], list[int]] = {}
    batches = []
    decodes = []
    for path in paths:
        sequence = FakeSequence([])
        for index, (name, count) in enumerate(path):
            key = tuple(each for each, _ in path[: index + 1])
            if key not in known:
                known[key] = [next(free) for _ in range(-(-count // block_size))]
            sequence.blocks += known[key]
            sequence.tokens += [(sum(name.encode()) + 7 * i) % 64 for i in range(count)]
        before = len(sequence.tokens) - 1
        batches.append(build_batch([(sequence, before)], block_size))
        sequence.computed = before
        decodes.append((sequence, 1))
    others = []
    for before, new in chunks:
        count = -(-(before + new) // block_size)
        blocks = [next(free) for _ in range(count)]
        other = FakeSequence([(5 * i) % 64 for i in range(before + new)], blocks)
        batches.append(build_batch([(other, before)], block_size))
        other.computed = before
        others.append((other, new))
    batches.append(build_batch([*decodes, *others], block_size))
    return batches


def layers(weights: Weights, project: Callable[[int, int], Any] | None = None) -> Program:
    """Two, around a stream, as a decoder has them; `project` makes queries, keys and values."""
    case, width = Case(dim=32), 40
    spec = AttentionSpec(0, case.dim**-0.5)
    attention = SelfAttention(case.num_heads, case.num_kv_heads, case.dim, 0, no_norm, spec)
    norm = RMSNorm(weights.vector(width), 1e-5)
    parts = [
        (
            (project or weights.linear)(case.width, width),
            weights.linear(width, case.num_heads * case.dim),
            GatedMLP(weights.linear(100, width), weights.linear(width, 50), ACTIVATIONS["silu"]),
        )
        for _ in range(2)
    ]

    def body(ops: Ops[Any], hidden: Any) -> Any:
        for qkv, output, mlp in parts:
            queries = ops.write(ops.linear(ops.norm(hidden, norm), qkv), attention)
            if mlp is parts[-1][2]:
                hidden, queries = ops.select_rows(hidden, queries)
            update = ops.linear(ops.attend(queries, attention), output)
            hidden = ops.add(hidden, update, norm, 0.5)
            hidden = ops.add(hidden, ops.mlp(ops.norm(hidden, norm), mlp), no_norm, 0.5)
        return hidden

    heads = LayerShape(case.num_kv_heads, case.dim, case.dim)
    rope = RopeSpec(32, 1e4, 64, 64)
    return Program(weights, width, body, rope=rope, heads=heads, body_selects=True)
