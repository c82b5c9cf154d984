"""What each sequence has said until now: every replay starts from here.

Knows ids and what the model found of the prompt, nothing of blocks, steps or text. Whatever a
shard holds of a sequence can be rebuilt from here.
"""

from collections.abc import Sequence
from typing import NamedTuple


class TopToken(NamedTuple):
    """A likely token at some position."""

    id: int
    logprob: float


class TokenLog:
    """The ids one sequence consists of, prompt first; only ever appended to."""

    __slots__ = ("_prompt_logprobs", "_prompt_top_tokens", "ids", "num_prompt")

    def __init__(self, prompt_ids: Sequence[int]) -> None:
        self.ids: list[int] = list(prompt_ids)
        self.num_prompt = len(self.ids)
        self._prompt_logprobs: dict[int, float] = {}
        self._prompt_top_tokens: dict[int, tuple[TopToken, ...]] = {}

    @property
    def num_generated(self) -> int:
        return len(self.ids) - self.num_prompt

    @property
    def prompt_ids(self) -> list[int]:
        return self.ids[: self.num_prompt]

    @property
    def generated_ids(self) -> list[int]:
        return self.ids[self.num_prompt :]

    def take_prompt_logprobs(
        self,
        first_position: int,
        logprobs: Sequence[float],
        top_tokens: Sequence[tuple[TopToken, ...]] = (),
    ) -> None:
        """Note what was found of prompt tokens; a replay may bring some again."""
        self._prompt_logprobs.update(enumerate(logprobs, first_position))
        self._prompt_top_tokens.update(enumerate(top_tokens, first_position))

    @property
    def has_prompt_logprobs(self) -> bool:
        """Whether every prompt token but the first has its log-probability."""
        return len(self._prompt_logprobs) >= self.num_prompt - 1

    def prompt_logprobs(self) -> list[float | None]:
        """One entry per prompt token; the first has none."""
        return [self._prompt_logprobs.get(position) for position in range(self.num_prompt)]

    def prompt_top_tokens(self) -> list[tuple[TopToken, ...]]:
        """One entry per prompt token, most likely first; empty where none were asked for."""
        return [self._prompt_top_tokens.get(position, ()) for position in range(self.num_prompt)]
