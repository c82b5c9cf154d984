"""A step that was launched and is not collected yet."""

from collections.abc import Sequence
from typing import NamedTuple

from kagami_shard.backends.base import Elapsed
from kagami_shard.engine.items import Item, prompt_rows
from kagami_shard.engine.step import PromptLogprobs, StepResult, TopTokens
from kagami_shard.sampling.logprobs import Scores
from kagami_shard.sampling.sampler import Drawn


class Launched(NamedTuple):
    """A step that the device works on."""

    number: int
    items: list[Item]
    """The items that sample a token, in the order of `drawn`'s rows"""
    drawn: Drawn
    prompt_items: list[Item]
    prompt_scores: Scores | None
    failures: dict[int, str]
    started_ns: int
    admission_ns: int
    elapsed: Elapsed


def is_known_done(launched: Launched | StepResult) -> bool:
    """Whether the device has finished, well or not. Does not wait for it."""
    return isinstance(launched, StepResult) or launched.elapsed.is_done


def top_tokens(launched: Launched, rows: Sequence[int]) -> list[TopTokens]:
    if not any(launched.items[row].state.top_n_tokens for row in rows):
        return []
    ids = launched.drawn.top_ids.tolist()
    logprobs = launched.drawn.top_logprobs.tolist()
    return [
        TopTokens(index, ids[row][:width], logprobs[row][:width])
        for index, row in enumerate(rows)
        if (width := launched.items[row].state.top_n_tokens)
    ]


def split_prompt_logprobs(launched: Launched) -> list[PromptLogprobs]:
    if launched.prompt_scores is None:
        return []
    logprobs, top_ids, top_logprobs = (column.tolist() for column in launched.prompt_scores)
    result = []
    start = 0
    for item in launched.prompt_items:
        end = start + prompt_rows(item)
        width = item.state.top_n_tokens
        result.append(
            PromptLogprobs(
                item.state.id,
                item.position + 1,
                logprobs[start:end],
                [row[:width] for row in top_ids[start:end]] if width else (),
                [row[:width] for row in top_logprobs[start:end]] if width else (),
            )
        )
        start = end
    return result
