"""Attention in the library against torch's, over random shapes, caches and steps."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.fakes.batches import FakeSequence, build_batch
from tests.fakes.own_memory import resident_bytes
from tests.shard.backends.native.attention_steps import (
    MIXED,
    TREES,
    WIDE,
    Case,
    branching,
    layers,
    steps_of,
)
from tests.shard.backends.native.programs import (
    ARRANGED,
    BLOCK_SIZE,
    CPU,
    NEAR,
    Program,
    Weights,
    is_near,
    quick,
    seeds,
)

from kagami_shard.backends.native.library import Library
from kagami_shard.backends.native.model import replay_into
from kagami_shard.backends.native.page_tables import PageTables
from kagami_shard.backends.native.recorder import record
from kagami_shard.backends.native.runtime import Runtime
from kagami_shard.backends.torch.ops import TorchOps
from kagami_shard.backends.torch.sdpa import SdpaAttention
from kagami_shard.forward.kv_cache import KVCache, LayerShape
from kagami_shard.layers.embedding import Embedding
from kagami_shard.layers.linear import Linear


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
