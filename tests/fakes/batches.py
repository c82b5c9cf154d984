"""Steps by hand: `ForwardBatch`es for sequences given as tokens and how many are computed."""

import random
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor

from kagami_shard.backends.base import Backend
from kagami_shard.forward.batch import ForwardBatch, Queries
from kagami_shard.forward.kv_cache import blocks_for
from kagami_shard.forward.output import OutputKind

CPU = torch.device("cpu")


@dataclass(slots=True, eq=False)
class FakeSequence:
    """Its tokens, how many of them the cache holds, and where."""

    tokens: list[int]
    blocks: list[int] = field(default_factory=list)
    computed: int = 0


def build_batch(
    work: Items[tuple[FakeSequence, int]],
    block_size: int,
    *,
    all_rows: bool = False,
    device: torch.device = CPU,
    rows: Items[int] | None = None,
) -> ForwardBatch:
    """A step over the next `count` tokens of each sequence; single tokens must come first.

    Logits are asked for after each sequence's last token, after every token, or after `rows`.
    """
    lens = tuple(count for _, count in work)
    num_decodes = next((i for i, count in enumerate(lens) if count > 1), len(lens))
    assert all(count > 1 for count in lens[num_decodes:]), "single tokens come first"
    ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    for sequence, count in work:
        span = range(sequence.computed, sequence.computed + count)
        ids += [sequence.tokens[i] for i in span]
        positions += span
        slots += [sequence.blocks[i // block_size] * block_size + i % block_size for i in span]
    width = max(len(sequence.blocks) for sequence, _ in work)
    tables = [sequence.blocks + [0] * (width - len(sequence.blocks)) for sequence, _ in work]
    if rows is None:
        rows = range(len(ids)) if all_rows else [end - 1 for end in accumulate(lens)]

    def tensor(values: Items[object]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    queries = Queries(
        block_tables=tensor(tables),
        query_lens=lens,
        kv_lens=tuple(sequence.computed + count for sequence, count in work),
        num_decodes=num_decodes,
    )
    return ForwardBatch(
        input_ids=tensor(ids),
        positions=tensor(positions),
        slots=tensor(slots),
        queries=queries,
        selected_rows=tensor(rows),
        selected=queries.at(rows),
    )


class Runner:
    """Feeds sequences to a model by hand, over blocks in shuffled order."""

    def __init__(self, backend: Backend, *, num_blocks: int = 64, block_size: int = 4) -> None:
        self._backend = backend
        self._block_size = block_size
        self.cache = backend.new_cache(num_blocks, block_size)
        self._free = list(range(1, num_blocks))
        random.Random(0).shuffle(self._free)

    def add(self, tokens: Items[int]) -> FakeSequence:
        """A sequence with blocks for all its tokens."""
        needed = blocks_for(len(tokens), self._block_size)
        blocks, self._free = self._free[:needed], self._free[needed:]
        assert len(blocks) == needed, "the fake pool is too small"
        return FakeSequence(list(tokens), blocks)

    def step(self, *work: tuple[FakeSequence, int]) -> list[Tensor]:
        """Run the next tokens of each; returns the logits of each, `[count, vocab_size]`."""
        logits = self._run(work, range(sum(count for _, count in work)))
        return list(logits.split([count for _, count in work]))

    def step_for_last(self, *work: tuple[FakeSequence, int]) -> Tensor:
        """The same, with logits after the last token of each alone: `[len(work), vocab_size]`."""
        return self._run(work, [end - 1 for end in accumulate(count for _, count in work)])

    def step_without_logits(self, *work: tuple[FakeSequence, int]) -> None:
        self._run(work, [])

    @torch.inference_mode()
    def _run(self, work: Items[tuple[FakeSequence, int]], rows: Items[int]) -> Tensor:
        batch = build_batch(work, self._block_size, rows=rows, device=self._backend.device)
        logits = self._backend.run(batch, self.cache, OutputKind.LOGITS).logits
        assert logits is not None
        for sequence, count in work:
            sequence.computed += count
        return logits
