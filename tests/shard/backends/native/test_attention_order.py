"""A row attends with the same bits whoever computes which part of it, and whoever is beside it.

Values of a row nearly cancel here, so that what is left of them is the rounding of its sums: any
other order of the additions shows.
"""

import random
from collections.abc import Callable

import pytest
import torch
from tests.fakes.batches import FakeSequence, build_batch
from tests.shard.backends.native.attention_steps import Case
from tests.shard.backends.native.programs import CPU, Weights
from torch import Tensor

from kagami_shard.backends.native.library import Library
from kagami_shard.backends.native.model import replay_into
from kagami_shard.backends.native.page_tables import PageTables
from kagami_shard.backends.native.recorder import record
from kagami_shard.backends.native.runtime import Runtime
from kagami_shard.backends.native.tape import Tape
from kagami_shard.forward.kv_cache import KVCache
from kagami_shard.layers.embedding import Embedding
from kagami_shard.layers.linear import Linear

LENGTH = 407
Work = list[tuple[FakeSequence, int]]


def cancelling(case: Case, *, scores: float) -> Callable[[Weights], Tensor]:
    """A table whose rows 63 - i are the negated rows i, of magnitudes from 2^-12 to 2^12."""

    def table(weights: Weights) -> Tensor:
        half = weights.matrix(32, case.width)
        half *= torch.exp2(weights.matrix(32, case.width, 4.0).clamp(-12, 12).round())
        half[:, : -case.num_kv_heads * case.dim] = scores  # queries and keys
        return torch.cat((half, -half.flip(0)))

    return table


class Steps:
    """Steps of one layer on a cache; a sequence begins with tokens that cancel."""

    def __init__(self, tape: Tape, case: Case, block_size: int) -> None:
        self._tape = tape
        self._columns = case.width
        self._block_size = block_size
        shape = case.program(Weights(0, torch.bfloat16)).heads
        self._cache = KVCache([shape], 1200, block_size, dtype=torch.bfloat16, device=CPU)
        self._next = 1

    def sequence(self, length: int = LENGTH, *, seed: int = 0) -> FakeSequence:
        """The first half of its tokens by chance, then their opposites in another order."""
        chance = random.Random(seed)
        first = [chance.randrange(64) for _ in range(length // 2)]
        second = [63 - token for token in first]
        chance.shuffle(second)
        tokens = [*first, *second, 5][:length]
        return FakeSequence(tokens, self.blocks(length))

    def blocks(self, length: int) -> list[int]:
        first, self._next = self._next, self._next + -(-length // self._block_size)
        return list(range(first, self._next))

    def run(self, *work: tuple[FakeSequence, int]) -> Tensor:
        """The last row of each, `[len(work), columns]`."""
        ordered = sorted(work, key=lambda each: each[1] > 1)
        batch = build_batch(ordered, self._block_size)
        logits = torch.empty(len(work), self._columns)
        replay_into(self._tape, batch, PageTables(self._cache), logits)
        for sequence, count in work:
            sequence.computed += count
        return logits

    def last_of(self, sequence: FakeSequence, *mates: tuple[FakeSequence, int]) -> Tensor:
        """The row of `sequence`'s last token, a decode beside `mates`."""
        return self.run((sequence, 1), *mates)[0]

    def known(self, length: int = LENGTH, *, seed: int = 0) -> FakeSequence:
        """A sequence whose last token alone is not computed."""
        sequence = self.sequence(length, seed=seed)
        self.run((sequence, length - 1))
        return sequence

    def sharing(self, of: FakeSequence, num_blocks: int, length: int) -> FakeSequence:
        """Another that begins with `of`'s blocks."""
        shared = num_blocks * self._block_size
        tokens = [*of.tokens[:shared], *(token % 64 for token in range(length - shared))]
        blocks = [*of.blocks[:num_blocks], *self.blocks(length - shared)]
        other = FakeSequence(tokens, blocks, shared)
        self.run((other, length - 1 - shared))
        return other


def alone(steps: Steps) -> Tensor:
    return steps.last_of(steps.known())


def beside_a_chunk(steps: Steps) -> Tensor:
    return steps.last_of(steps.known(), (steps.sequence(70, seed=1), 70))


def beside_a_long_chunk(steps: Steps) -> Tensor:
    return steps.last_of(steps.known(), (steps.sequence(400, seed=1), 400))


def beside_decodes(steps: Steps) -> Tensor:
    mates = [(steps.known(30 + seed, seed=seed), 1) for seed in range(1, 14)]
    return steps.last_of(steps.known(), *mates)


def beside_two_who_share(steps: Steps) -> Tensor:
    ours = steps.known()
    mates = [(steps.sharing(ours, 320 // steps._block_size, 330 + i), 1) for i in range(2)]
    return steps.last_of(ours, *mates)


def beside_some_who_share_more_and_less(steps: Steps) -> Tensor:
    ours = steps.known()
    mates = [
        (steps.sharing(ours, count // steps._block_size, 390 + i), 1)
        for i, count in enumerate((384, 384, 288, 160, 96))
    ]
    return steps.last_of(ours, *mates)


def beside_many_who_share(steps: Steps) -> Tensor:
    ours = steps.known()
    mates = [(steps.sharing(ours, 256 // steps._block_size, 300 + i), 1) for i in range(23)]
    return steps.last_of(ours, *mates)


def end_of_a_chunk(steps: Steps) -> Tensor:
    sequence = steps.sequence()
    steps.run((sequence, LENGTH - 37))
    return steps.run((sequence, 37))[0]


def end_of_a_prompt(steps: Steps) -> Tensor:
    return steps.run((steps.sequence(), LENGTH))[0]


WAYS = [
    beside_a_chunk,
    beside_a_long_chunk,
    beside_decodes,
    beside_two_who_share,
    beside_some_who_share_more_and_less,
    beside_many_who_share,
    end_of_a_chunk,
    end_of_a_prompt,
]


@pytest.fixture(scope="module", params=[1, 3], ids="{} threads".format)
def threads(request: pytest.FixtureRequest, library: Library) -> Runtime:
    return Runtime(library, request.param, use_amx=False)


@pytest.mark.parametrize("block_size", [4, 32])
@pytest.mark.parametrize(
    "case",
    [
        Case(dim=32, rotary=32),
        Case(dim=64, group=1),
        Case(dim=32, window=150),
        Case(dim=32, softcap=1.5),
    ],
    ids=str,
)
@pytest.mark.parametrize("scores", [0.0, 0.3])
def test_a_row_attends_with_the_same_bits_in_every_company(
    threads: Runtime, case: Case, block_size: int, scores: float
) -> None:
    copied = torch.eye(case.width, case.num_heads * case.dim, dtype=torch.bfloat16)
    program = case.program(Weights(0, torch.bfloat16), output=Linear(copied))
    table = cancelling(case, scores=scores)(Weights(1, torch.bfloat16))
    program.embedding = Embedding(table)
    tape = record(program, threads)

    expected = alone(Steps(tape, case, block_size))

    for way in WAYS:
        assert torch.equal(way(Steps(tape, case, block_size)), expected), way.__name__
