"""Every op of the library against its twin in torch, over random shapes.

A *program* is written in the verbs of `Ops`: `TorchOps` computes it in float32, the library from
the same values, all of which bf16 can hold. What it brings comes out through a head that copies.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.fakes.batches import FakeSequence, build_batch
from tests.shard.test_kv_cache import resident_bytes
from torch import Tensor

from kagami_shard.attention.base import AttentionSpec
from kagami_shard.attention.sdpa import SdpaAttention
from kagami_shard.batch import ForwardBatch
from kagami_shard.graphs import record
from kagami_shard.kv_cache import KVCache, LayerShape
from kagami_shard.layers.embedding import Embedding, Head
from kagami_shard.layers.linear import Linear
from kagami_shard.layers.mlp import ACTIVATIONS, MLP, GatedMLP
from kagami_shard.layers.norm import FullNorm, LayerNorm, RMSNorm, Rounding, no_norm
from kagami_shard.layers.rotary import RopeSpec, RotaryEmbedding
from kagami_shard.models.ops import Ops, SelfAttention, T, TorchOps
from kagami_shard.models.recorded import replay_into
from kagami_shard.native.library import Library
from kagami_shard.native.page_tables import PageTables
from kagami_shard.native.runtime import Runtime

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
        body_keeps: bool = False,
    ) -> None:
        """Rows without logits leave it in the body, or else at its end."""
        self.embedding = Embedding(weights.matrix(64, width), multiplier)
        self._round = Rounding(weights.dtype)
        self._body = body
        self._body_keeps = body_keeps
        self._head = head
        self._width = width
        self._dtype = weights.dtype
        self.ropes = [] if rope is None else [RotaryEmbedding(rope, CPU)]
        self.heads = heads

    def run(self, ops: Ops[T]) -> T:
        hidden = self._body(ops, ops.embed(self.embedding))
        if not self._body_keeps:
            (hidden,) = ops.keep(hidden)
        head = self._head or Head(Linear(torch.eye(self._width, dtype=self._dtype)), self._width)
        return ops.logits(hidden, self._round, head)


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
) -> bool:
    """Whether the library's steps bring what torch's bring, each on a cache of its own."""
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
        if not (ours - expected).abs().max() <= near * expected.abs().max().clamp(min=1.0):
            return False
    return True


@quick
@given(st.integers(1, 40), sizes, sizes, st.booleans(), seeds)
def test_a_head_is_torchs(
    runtime: Runtime, count: int, width: int, out: int, bias: bool, seed: int
) -> None:
    def make(weights: Weights) -> Program:
        linear = weights.linear(out, width, bias=bias)
        head = Head(linear, out, divisor=3.0)
        return Program(weights, width, lambda ops, hidden: hidden, head=head)

    assert is_near(runtime, make, seed, prompt(count))


def test_logits_are_capped_and_an_embedding_is_scaled(runtime: Runtime) -> None:
    def make(weights: Weights) -> Program:
        head = Head(weights.linear(33, 24), 33, softcap=2.0)
        return Program(weights, 24, lambda ops, hidden: hidden, head=head, multiplier=1.5)

    assert is_near(runtime, make, 0, prompt(9))


def test_a_tied_head_is_read_by_both_ends(runtime: Runtime) -> None:
    def make(weights: Weights) -> Program:
        program = Program(weights, 40, lambda ops, hidden: hidden)
        program._head = Head(Linear(program.embedding.weight), 64)
        return program

    assert is_near(runtime, make, 0, prompt(9))


@quick
@given(lengths, sizes, st.floats(0.1, 2.0), seeds)
def test_a_linear_layer_adds_to_the_stream(
    runtime: Runtime, count: int, width: int, factor: float, seed: int
) -> None:
    def make(weights: Weights) -> Program:
        linear = weights.linear(width, width)

        def body(ops: Ops[Any], hidden: Any) -> Any:
            update = ops.linear(ops.norm(hidden, Rounding(weights.dtype)), linear)
            return ops.add(hidden, update, no_norm, factor)

        return Program(weights, width, body)

    assert is_near(runtime, make, seed, prompt(count))


@quick
@given(
    st.integers(1, 40),
    sizes,
    sizes,
    st.sampled_from(["silu", "gelu", "gelu_pytorch_tanh", "relu"]),
    st.booleans(),
    seeds,
)
def test_an_mlp_is_torchs(
    runtime: Runtime, count: int, width: int, inner: int, name: str, gated: bool, seed: int
) -> None:
    def make(weights: Weights) -> Program:
        up, down = weights.linear(inner * (1 + gated), width), weights.linear(width, inner)
        mlp = (GatedMLP if gated else MLP)(up, down, ACTIVATIONS[name])

        def body(ops: Ops[Any], hidden: Any) -> Any:
            return ops.mlp(ops.norm(hidden, Rounding(weights.dtype)), mlp)

        return Program(weights, width, body)

    assert is_near(runtime, make, seed, prompt(count))


@quick
@given(st.integers(1, 40), sizes, st.sampled_from(["rms", "centered", "layer"]), seeds)
def test_norms_are_torchs(runtime: Runtime, count: int, width: int, kind: str, seed: int) -> None:
    def make(weights: Weights) -> Program:
        weight, bias = weights.vector(width), weights.vector(width)
        norm = {
            "rms": RMSNorm(weight, 1e-5),
            "centered": RMSNorm(weight, 1e-5, center=1.0),
            "layer": LayerNorm(weight, bias, 1e-5),
        }[kind]
        linear = weights.linear(width, width)

        def body(ops: Ops[Any], hidden: Any) -> Any:
            return ops.add(hidden, ops.linear(ops.norm(hidden, norm), linear), norm, 0.5)

        return Program(weights, width, body)

    # LayerNorm of few values divides by a variance that rounding made.
    assert width < 8 or is_near(runtime, make, seed, prompt(count))


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
            (queries,) = ops.keep(ops.write(hidden, attention))
            return ops.linear(ops.attend(queries, attention), output)

        return Program(
            weights,
            self.width,
            body,
            head=head,
            rope=RopeSpec(self.rotary, 1e4, 64, 64),
            heads=LayerShape(self.num_kv_heads, self.dim, self.dim),
            body_keeps=True,
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


MIXED = [(5, 1), (0, 1), (13, 1), (0, 37), (6, 5), (34, 4)]


@pytest.mark.parametrize(
    "case",
    [
        Case(),
        Case(dim=8, rotary=6, group=1),
        Case(dim=80, rotary=80, num_kv_heads=1),
        Case(dim=256, rotary=64, num_kv_heads=1, group=2),
        Case(num_kv_heads=1, group=64, dim=4, rotary=4),
        Case(window=3),
        Case(window=1),
        Case(softcap=1.5),
        Case(window=5, softcap=0.7),
        Case(qk_norm="heads"),
        Case(qk_norm="all"),
    ],
    ids=str,
)
def test_chunks_and_decodes_attend_as_in_torch(runtime: Runtime, case: Case) -> None:
    assert is_near(runtime, case.program, 0, *steps_of(MIXED, 0))


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_a_token_that_sees_itself_alone_takes_its_value_as_it_is(
    runtime: Runtime, softcap: float | None
) -> None:
    case = Case(softcap=softcap)

    def make(weights: Weights) -> Program:
        copied = torch.eye(case.width, case.num_heads * case.dim, dtype=weights.dtype)
        return case.program(weights, output=Linear(copied))

    assert is_near(runtime, make, 0, *steps_of([(0, 1)] * 5, 0), near=1e-6)


def test_a_long_decode_is_cut_among_the_threads(runtime: Runtime) -> None:
    steps = steps_of([(200, 1)], 0)
    long = FakeSequence([i % 64 for i in range(249)], list(range(1, 64)))
    first = build_batch([(long, 240)], BLOCK_SIZE)
    long.computed = 240
    assert is_near(runtime, Case().program, 0, *steps, first, build_batch([(long, 1)], BLOCK_SIZE))


WIDE = [(5, 1), (0, 1), (31, 1), (32, 1), (70, 1), (0, 37), (31, 33), (64, 70), (190, 5)]


@pytest.mark.parametrize("block_size", [32, 64, 96])
@pytest.mark.parametrize(
    "case",
    [
        Case(dim=32, rotary=32),
        Case(dim=64, rotary=64, num_kv_heads=3),
        Case(dim=96, rotary=48, num_kv_heads=1, group=2),
        Case(dim=256, rotary=64, num_kv_heads=1, group=2),
        Case(dim=32, window=5),
        Case(dim=32, window=33),
        Case(dim=64, window=70, softcap=0.7),
    ],
    ids=str,
)
def test_an_arranged_cache_is_attended_to_as_in_torch(
    runtime: Runtime, case: Case, block_size: int
) -> None:
    steps = steps_of(WIDE, 0, block_size)
    assert is_near(runtime, case.program, 0, *steps, block_size=block_size)


@pytest.mark.parametrize("factor", [2.0, 3.0])
def test_a_score_far_above_those_before_takes_over(runtime: Runtime, factor: float) -> None:
    def make(weights: Weights) -> Program:
        program = Case(dim=32, rotary=32).program(weights)
        program.embedding = Embedding(weights.matrix(64, program.embedding.source.shape[1]), factor)
        return program

    assert is_near(runtime, make, 0, *steps_of(WIDE, 0, ARRANGED), block_size=ARRANGED)


def test_what_torch_has_cached_is_arranged(runtime: Runtime) -> None:
    case = Case(dim=32, num_kv_heads=3)
    exact, rounded = (case.program(Weights(0, t)) for t in (torch.float32, torch.bfloat16))
    cache, reference = (
        KVCache([exact.heads], 64, ARRANGED, dtype=t, device=CPU)
        for t in (torch.bfloat16, torch.float32)
    )
    *before, last = steps_of(WIDE, 0, ARRANGED)
    for batch in before:
        exact.run(TorchOps(batch, SdpaAttention().prepare(batch, reference), exact.ropes))
    cache.keys[0].copy_(reference.keys[0])
    cache.values[0].copy_(reference.values[0])
    expected = exact.run(TorchOps(last, SdpaAttention().prepare(last, reference), exact.ropes))
    tape = record(rounded, runtime)
    runtime.arrange(cache)
    ours = torch.full_like(expected, float("nan"))
    replay_into(tape, last, PageTables(cache), ours)
    torch.testing.assert_close(ours, expected, atol=NEAR * float(expected.abs().max()), rtol=0)


def test_arranging_a_cache_takes_no_memory_for_what_was_never_written(runtime: Runtime) -> None:
    small, large = (
        KVCache([LayerShape(4, 64, 64)], count, 32, dtype=torch.bfloat16, device=CPU)
        for count in (2, 1 << 12)
    )
    runtime.arrange(small)  # what the library itself takes at the first time
    before = resident_bytes()
    runtime.arrange(large)
    assert large.num_bytes == 128 << 20
    assert resident_bytes() - before < 8 << 20


@pytest.mark.parametrize("count", [1, 2, 33])
def test_what_lies_behind_a_sequence_in_an_arranged_block_does_not_count(
    runtime: Runtime, count: int
) -> None:
    program = Case(dim=32).program(Weights(0, torch.bfloat16))
    cache = KVCache([program.heads], 4, ARRANGED, dtype=torch.bfloat16, device=CPU)
    for tensor in (*cache.keys, *cache.values):
        tensor.fill_(float("nan"))
    batch = build_batch([(FakeSequence([3] * count, [2, 1]), count)], ARRANGED)
    logits = torch.empty(1, program.embedding.weight.shape[1])
    replay_into(record(program, runtime), batch, PageTables(cache), logits)
    assert logits.isfinite().all()


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
                hidden, queries = ops.keep(hidden, queries)
            update = ops.linear(ops.attend(queries, attention), output)
            hidden = ops.add(hidden, update, norm, 0.5)
            hidden = ops.add(hidden, ops.mlp(ops.norm(hidden, norm), mlp), no_norm, 0.5)
        return hidden

    heads = LayerShape(case.num_kv_heads, case.dim, case.dim)
    rope = RopeSpec(32, 1e4, 64, 64)
    return Program(weights, width, body, rope=rope, heads=heads, body_keeps=True)


@pytest.mark.parametrize("all_rows", [True, False])
@pytest.mark.parametrize("count", [127, 128, 173])
def test_a_step_that_is_cut_by_rows_is_torchs(runtime: Runtime, count: int, all_rows: bool) -> None:
    work = [(FakeSequence([3], [1]), 1), (FakeSequence([7 * i % 64 for i in range(count)]), count)]
    work[1][0].blocks = [5, 3, 9, 2, 8, 4]
    batch = build_batch(work, ARRANGED, all_rows=all_rows)
    assert is_near(runtime, layers, 0, batch, block_size=ARRANGED)


@pytest.mark.parametrize("all_rows", [True, False])
def test_threads_that_wait_for_a_core_are_helped(library: Library, all_rows: bool) -> None:
    runtime = Runtime(library, 7, spins=10, use_amx=False)
    work = [(FakeSequence([7 * i % 64 for i in range(470)], list(range(1, 16))), 470)]
    batch = build_batch(work, ARRANGED, all_rows=all_rows)
    assert is_near(runtime, layers, 0, *[batch] * 5, block_size=ARRANGED)


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


@pytest.mark.parametrize("case", [Case(), Case(softcap=0.7), Case(window=20)], ids=str)
@pytest.mark.parametrize("tree", TREES)
def test_decodes_that_share_a_prefix_attend_as_in_torch(
    runtime: Runtime, tree: str, case: Case
) -> None:
    assert is_near(runtime, case.program, 0, *branching(TREES[tree]))


@pytest.mark.parametrize("tree", TREES)
def test_decodes_share_a_prefix_in_an_arranged_cache(runtime: Runtime, tree: str) -> None:
    steps = branching(TREES[tree], (30, 9), block_size=ARRANGED)
    assert is_near(runtime, Case(dim=32).program, 0, *steps, block_size=ARRANGED)


def test_a_chunk_beside_decodes_with_a_prefix_attends_as_in_torch(runtime: Runtime) -> None:
    assert is_near(runtime, Case().program, 0, *branching(TREES["a branch shares more"], (30, 9)))


@quick
@given(
    work=st.lists(st.tuples(st.integers(0, 20), st.integers(1, 20)), min_size=1, max_size=5),
    case=st.builds(
        Case,
        num_kv_heads=st.integers(1, 3),
        group=st.integers(1, 5),
        dim=st.sampled_from([16, 32, 48, 64]),
        window=st.none() | st.integers(1, 24),
        softcap=st.none() | st.floats(0.5, 5),
        qk_norm=st.sampled_from(["none", "heads", "all"]),
    ),
    seed=seeds,
    block_size=st.sampled_from([BLOCK_SIZE, ARRANGED]),
    num_rows=st.none() | st.integers(1, 60),
)
def test_any_attention_is_torchs(
    runtime: Runtime,
    work: list[tuple[int, int]],
    case: Case,
    seed: int,
    block_size: int,
    num_rows: int | None,
) -> None:
    steps = steps_of(work, seed, block_size, num_rows=num_rows)
    assert is_near(runtime, case.program, seed, *steps, block_size=block_size)


@pytest.mark.parametrize("num_rows", [1, 4, 100, 330])
def test_a_layer_goes_on_with_any_rows_as_torch_does(runtime: Runtime, num_rows: int) -> None:
    steps = steps_of([*WIDE, (70, 130)], num_rows, ARRANGED, num_rows=num_rows)
    assert is_near(runtime, layers, 0, *steps, block_size=ARRANGED)


@quick
@given(st.integers(1, 9), st.integers(1, 300), seeds)
def test_greedy_rows_are_argmax_and_its_logprob(
    runtime: Runtime, count: int, vocab_size: int, seed: int
) -> None:
    logits = Weights(seed, torch.float32).matrix(count, vocab_size, 5.0)
    ids, logprobs = runtime.choose(logits)
    assert (ids == logits.argmax(-1)).all()
    torch.testing.assert_close(logprobs, logits.log_softmax(-1).amax(-1), atol=1e-4, rtol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_greedy_row_without_a_distribution_has_no_finite_logprob(
    runtime: Runtime, value: float
) -> None:
    logits = torch.zeros(2, 40)
    logits[1, 17] = value
    _, logprobs = runtime.choose(logits)
    assert logprobs.isfinite().tolist() == [True, False]
