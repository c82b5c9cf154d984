"""Greedy decodes that go on from step to step: what does not change is not built again.

Most steps ask for the sequences of the step before, one token further. The caches are cold when
one begins, for the model has just been read through them, and all that lies between two forward
passes is paid for with the model standing still (notes/0015).
"""

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

from kagami_shard.engine.items import Item
from kagami_shard.engine.step import Step, WorkColumns
from kagami_shard.forward.kv_cache import KVCache


class Decodes(Protocol):
    """Decodes of some sequences, one token each in a step; rows are sequences."""

    @property
    def table_width(self) -> int:
        """Blocks that a row has room for."""

    @property
    def sampling_ns(self) -> int:
        """Of the last step: what choosing the tokens took."""

    def grant(self, row: int, first: int, blocks: Sequence[int]) -> None:
        """The row's blocks from its `first` one on."""

    def run(self) -> int:
        """One step, whose tokens the next one reads; how many rows gave no distribution."""

    def chosen(self) -> tuple[list[int], list[float]]:
        """The last step's tokens and their logprobs, one a row; not finite: no distribution."""


@runtime_checkable
class GreedyModel(Protocol):
    """A model that feeds itself with the most likely tokens."""

    def decodes(
        self,
        cache: KVCache,
        last_ids: Sequence[int],
        positions: Sequence[int],
        tables: Sequence[Sequence[int]],
    ) -> Decodes:
        """Decodes that begin with token `last_ids[i]` at `positions[i]`, blocks `tables[i]`."""


def is_greedy_decode(item: Item) -> bool:
    """Whether the item asks for nothing but its most likely next token."""
    state, sampling = item.state, item.state.sampling
    return (
        item.num_tokens == 1
        and item.end == len(state.ids)
        and not state.num_pending
        and not state.reads_last_id
        and not state.top_n_tokens
        and not sampling.do_sample
        and not sampling.logit_bias
        and not (state.prompt_logprobs and item.end < state.num_prompt_tokens)
    )


class GreedyBatch:
    """The sequences of a step, and what the next one will ask for if nothing comes between."""

    def __init__(
        self, model: GreedyModel, cache: KVCache, items: Sequence[Item], asked_ids: Sequence[int]
    ) -> None:
        """Of `items`, in the order in which `asked_ids` (those of more, maybe) names them."""
        self._states = [item.state for item in items]
        self.sequence_ids = [state.id for state in self._states]
        """Of each row"""
        self.token_ids: list[int] = []
        self.logprobs: list[float] = []
        position_of = {item.state.id: item.position for item in items}
        self._asked_ids = [one for one in asked_ids if one in position_of]
        self._positions = [position_of[one] for one in self._asked_ids]
        self._row_of = {state.id: row for row, state in enumerate(self._states)}
        self._block_size = cache.block_size
        self._decodes = model.decodes(
            cache,
            [item.state.ids[-1] for item in items],
            [item.position for item in items],
            [state.blocks for state in self._states],
        )
        self._num_steps_left = self._steps_left({})

    @property
    def sampling_ns(self) -> int:
        return self._decodes.sampling_ns

    def takes(self, step: Step) -> bool:
        """Whether `step` goes on with these sequences. If it does, its grants are taken in."""
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
        """One step; how many rows gave no distribution: after any, the batch is of no more use."""
        num_lost = self._decodes.run()
        self.token_ids, self.logprobs = self._decodes.chosen()
        for state, token_id in zip(self._states, self.token_ids, strict=True):
            state.ids.append(token_id)
        self._positions = [position + 1 for position in self._positions]
        self._num_steps_left -= 1
        return num_lost

    def _steps_left(self, grants: Mapping[int, Sequence[int]]) -> int:
        """Steps until a sequence needs a block that it has not, `grants` taken in.

        0 where a grant is not for these sequences, or has no room.
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
