"""Greedy decodes that go on from step to step: what does not change is not built again.

Most steps ask for the same sequences as the step before, one token further. Python's work between
two forward passes is slow, for the CPU's caches have just been filled with weights, and the model
stands still meanwhile (notes/0015).
"""

from collections.abc import Iterable, Mapping, Sequence

from kagami_proto.values import Wanted
from kagami_shard.backends.base import Backend, Decodes
from kagami_shard.engine.items import Item
from kagami_shard.engine.step import Step, Work, WorkColumns
from kagami_shard.forward.kv_cache import KVCache


def is_greedy_decode(item: Item) -> bool:
    """Whether the item asks for nothing but its most likely next token."""
    state, sampling = item.state, item.state.sampling
    return (
        item.num_tokens == 1
        and item.wanted is Wanted.ONE_TOKEN
        and item.end == len(state.ids)
        and not state.num_pending
        and not state.reads_last_id
        and not state.top_n_tokens
        and not sampling.do_sample
        and not sampling.logit_bias
        and not (state.prompt_logprobs and item.end < state.num_prompt_tokens)
    )


class GreedyBatch:
    """The sequences of a step, and what the next step asks for if nothing changes."""

    def __init__(
        self, decodes: Decodes, block_size: int, items: Sequence[Item], asked_ids: Sequence[int]
    ) -> None:
        """`decodes` has a row for each of `items`; `asked_ids` is their order in a step."""
        self._states = [item.state for item in items]
        self.sequence_ids = [state.id for state in self._states]
        """The sequence of each row"""
        self.token_ids: list[int] = []
        self.logprobs: list[float] = []
        position_of = {item.state.id: item.position for item in items}
        self._asked_ids = asked_ids
        self._positions = [position_of[one] for one in asked_ids]
        self._row_of = {state.id: row for row, state in enumerate(self._states)}
        self._block_size = block_size
        self._decodes = decodes
        self._num_steps_left = self._steps_left({})

    @classmethod
    def of(
        cls, backend: Backend, cache: KVCache, items: Sequence[Item], work: Iterable[Work]
    ) -> "GreedyBatch | None":
        """The batch of `items`, the part of a step's `work` that can be done.

        None if an item wants more than a greedy decode, or the backend cannot carry them on.
        """
        if not all(map(is_greedy_decode, items)):
            return None
        decodes = backend.carry_on(
            cache,
            [item.state.ids[-1] for item in items],
            [item.position for item in items],
            [item.state.blocks for item in items],
        )
        if decodes is None:
            return None
        known = {item.state.id for item in items}
        asked_ids = [each.id for each in work if each.id in known]
        return cls(decodes, cache.block_size, items, asked_ids)

    @property
    def sampling_ns(self) -> int:
        return self._decodes.sampling_ns

    def takes(self, step: Step) -> bool:
        """Whether `step` goes on with these sequences. If so, its blocks are added to theirs."""
        work = step.work
        if (
            step.new_sequences
            or step.drop_ids
            or not isinstance(work, WorkColumns)
            or work.wanted
            or work.positions != self._positions
            or work.ids != self._asked_ids
            or work.counts.count(1) != len(self._positions)
        ):
            return False
        if not step.grants:
            return self._num_steps_left > 0
        left = self._steps_left(step.grants)
        if left < 1:
            return False
        for sequence_id, blocks in step.grants.items():
            row = self._row_of[sequence_id]
            known = self._states[row].blocks
            self._decodes.grant(row, len(known), blocks)
            known.extend(blocks)
        self._num_steps_left = left
        return True

    def run(self) -> int:
        """Compute one step; returns how many rows gave no distribution.

        If any did, the batch cannot be used again.
        """
        num_lost = self._decodes.run()
        self.token_ids, self.logprobs = self._decodes.chosen()
        for state, token_id in zip(self._states, self.token_ids, strict=True):
            state.ids.append(token_id)
        self._positions = [position + 1 for position in self._positions]
        self._num_steps_left -= 1
        return num_lost

    def _steps_left(self, grants: Mapping[int, Sequence[int]]) -> int:
        """Steps until a sequence needs a block that it does not have, with those of `grants`.

        0 if a grant is for another sequence, or its row has no room.
        """
        if not grants.keys() <= self._row_of.keys():
            return 0
        left = []
        for sequence_id, position in zip(self._asked_ids, self._positions, strict=True):
            known = self._states[self._row_of[sequence_id]].blocks
            num_blocks = len(known) + len(grants.get(sequence_id, ()))
            if num_blocks > self._decodes.table_width:
                return 0
            left.append(num_blocks * self._block_size - position)
        return min(left)
