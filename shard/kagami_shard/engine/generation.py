"""The engine's state of one sequence; all of it can be rebuilt from the ids at any time."""

from typing import NamedTuple

from torch import Tensor

from kagami_shard.engine.step import NewSequence
from kagami_shard.sampling.grammar import GrammarState
from kagami_shard.sampling.processors import History
from kagami_shard.sampling.sampler import SamplingRow


class Pending(NamedTuple):
    """A sampled id that is still on the device: row `row` of `token_ids`."""

    token_ids: Tensor
    row: int


class GenerationState:
    """Ids, blocks and parameters of one sequence."""

    __slots__ = (
        "blocks",
        "grammar",
        "has_failed",
        "history",
        "id",
        "ids",
        "num_pending",
        "num_prompt_tokens",
        "pending",
        "prompt_logprobs",
        "sampling",
        "top_n_tokens",
    )

    def __init__(self, new: NewSequence, grammar: GrammarState | None = None) -> None:
        self.id = new.id
        self.ids = list(new.token_ids)
        self.num_prompt_tokens = new.num_prompt_tokens
        self.sampling = new.sampling
        self.top_n_tokens = new.top_n_tokens
        self.prompt_logprobs = new.prompt_logprobs
        self.grammar = grammar
        self.blocks: list[int] = []
        self.pending: Pending | None = None
        """The last sampled id, while it has not been read"""
        self.num_pending = 0
        """Two when a step was launched before the one before it was collected"""
        self.has_failed = False
        self.history = (
            History(self.ids, self.num_prompt_tokens) if self.sampling.has_penalty else None
        )

    @property
    def reads_last_id(self) -> bool:
        """Whether choosing a token needs the one before it on the host."""
        return self.history is not None or self.grammar is not None or self.sampling.watermark

    @property
    def num_known(self) -> int:
        """Tokens that have an id, also those whose id is still on the device."""
        return len(self.ids) + self.num_pending

    def row(self) -> SamplingRow:
        """What the sampler needs to draw the next token."""
        return SamplingRow(
            self.sampling, self.num_known, self.history, self.top_n_tokens, last_id=self.ids[-1]
        )

    def expect(self, pending: Pending) -> None:
        """One more id was sampled and lies on the device."""
        self.pending = pending
        self.num_pending += 1

    def take(self, token_id: int) -> None:
        """The oldest pending id has been read."""
        self.num_pending -= 1
        if not self.num_pending:
            self.pending = None
        self.ids.append(token_id)
        if self.history is not None:
            self.history.extend((token_id,))
        if self.grammar is not None:
            self.grammar.take(token_id)
