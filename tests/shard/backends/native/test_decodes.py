"""Decodes that go on by themselves, against the same steps one by one."""

import pytest
import torch
from tests.fakes.batches import FakeSequence, build_batch
from tests.shard.backends.native.attention_steps import Case
from tests.shard.backends.native.programs import BLOCK_SIZE, CPU, Weights

from kagami_shard.backends.native.decodes import NativeDecodes
from kagami_shard.backends.native.model import replay_into
from kagami_shard.backends.native.page_tables import PageTables
from kagami_shard.backends.native.recorder import record
from kagami_shard.backends.native.runtime import Runtime
from kagami_shard.backends.native.tape import Tape
from kagami_shard.forward.kv_cache import KVCache
from kagami_shard.layers.embedding import Head

VOCAB = 64
Tokens = list[tuple[list[int], list[float]]]
STARTS = (0, 2 * BLOCK_SIZE - 2, 3)
NUM_STEPS = 2 * BLOCK_SIZE
# More than a batch has room for beside those that it begins with comes one by one.
BLOCKS = [[1 + 9 * row + index for index in range(9)] for row in range(len(STARTS))]


def recorded(runtime: Runtime) -> tuple[Tape, list[KVCache]]:
    """A layer as a tape, and two caches for it."""
    weights, case = Weights(3, torch.bfloat16), Case()
    program = case.program(weights, Head(weights.linear(VOCAB, case.width), VOCAB))
    caches = [
        KVCache([program.heads], 64, BLOCK_SIZE, dtype=torch.bfloat16, device=CPU) for _ in "12"
    ]
    return record(program, runtime), caches


def steps_one_by_one(tape: Tape, cache: KVCache) -> Tokens:
    sequences = [
        FakeSequence([5] * start + [7 + start], blocks, start)
        for start, blocks in zip(STARTS, BLOCKS, strict=True)
    ]
    tokens: Tokens = []
    for _ in range(NUM_STEPS):
        logits = torch.empty(len(sequences), VOCAB)
        batch = build_batch([(sequence, 1) for sequence in sequences], BLOCK_SIZE)
        replay_into(tape, batch, PageTables(cache), logits)
        ids, logprobs = tape.runtime.choose_tokens(logits)
        for sequence, token_id in zip(sequences, ids.tolist(), strict=True):
            sequence.tokens.append(token_id)
            sequence.computed += 1
        tokens.append((ids.tolist(), logprobs.tolist()))
    return tokens


def steps_that_go_on(tape: Tape, cache: KVCache) -> Tokens:
    """Each sequence is given a block when it needs it."""
    num_blocks = [start // BLOCK_SIZE + 1 for start in STARTS]
    decodes = NativeDecodes(
        tape,
        torch.empty(len(STARTS), VOCAB),
        PageTables(cache),
        last_ids=[7 + start for start in STARTS],
        positions=STARTS,
        tables=[blocks[:count] for blocks, count in zip(BLOCKS, num_blocks, strict=True)],
    )
    tokens: Tokens = []
    for step in range(NUM_STEPS):
        for row, start in enumerate(STARTS):
            if start + step >= num_blocks[row] * BLOCK_SIZE:
                decodes.grant(row, num_blocks[row], [BLOCKS[row][num_blocks[row]]])
                num_blocks[row] += 1
        assert decodes.run() == 0
        tokens.append(decodes.chosen())
    return tokens


def both(runtime: Runtime) -> tuple[Tokens, Tokens]:
    """What the two ways bring, each on a cache of its own."""
    tape, caches = recorded(runtime)
    return steps_one_by_one(tape, caches[0]), steps_that_go_on(tape, caches[1])


def test_decodes_that_go_on_bring_the_same_bits(runtime: Runtime) -> None:
    one_by_one, going_on = both(runtime)
    assert one_by_one == going_on


def test_a_row_without_a_distribution_is_counted(runtime: Runtime) -> None:
    tape, (cache, _) = recorded(runtime)
    cache.values[0][2] = float("nan")
    decodes = NativeDecodes(
        tape,
        torch.empty(2, VOCAB),
        PageTables(cache),
        last_ids=[1, 2],
        positions=[3, 3],
        tables=[[1], [2]],
    )
    assert decodes.run() == 1
    assert decodes.chosen()[1] == pytest.approx([decodes.chosen()[1][0], float("nan")], nan_ok=True)
