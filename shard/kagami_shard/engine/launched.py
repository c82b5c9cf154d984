"""A step between its launch and its results."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from kagami_shard.engine.items import Item, prompt_rows
from kagami_shard.engine.step import PromptLogprobs, StepResult, TopTokens
from kagami_shard.sampling.logprobs import Scores
from kagami_shard.sampling.sampler import Drawn


class Launched(NamedTuple):
    """A step that the device works on."""

    number: int
    items: list[Item]
    """Those that sample a token, in the order of `drawn`'s rows"""
    drawn: Drawn
    prompt_items: list[Item]
    prompt_scores: Scores | None
    failures: dict[int, str]
    started_ns: int
    device_events: tuple[torch.cuda.Event, torch.cuda.Event, torch.cuda.Event] | None
    """Before the forward pass, before the sampling, behind it"""
    admission_ns: int
    sampling_ns: int
    """On the host, which is the device on a CPU"""
    launched_ns: int


def is_known_done(launched: Launched | StepResult) -> bool:
    """Whether the device says that it has finished, well or not; without waiting for it."""
    if isinstance(launched, StepResult):
        return True
    try:
        return launched.device_events is not None and launched.device_events[2].query()
    except torch.AcceleratorError:
        return True  # it failed, and whoever collects hears so


def device_times(launched: Launched) -> tuple[int, int]:
    """Nanoseconds on the device: forward pass and sampling, and of these the sampling."""
    if launched.device_events is None:
        return launched.launched_ns - launched.started_ns, launched.sampling_ns
    start, drawing, end = launched.device_events
    end.synchronize()
    return int(start.elapsed_time(end) * 1e6), int(drawing.elapsed_time(end) * 1e6)


def top_tokens(launched: Launched, kept: Sequence[int]) -> list[TopTokens]:
    if not any(launched.items[row].state.top_n_tokens for row in kept):
        return []
    ids = launched.drawn.top_ids.tolist()
    logprobs = launched.drawn.top_logprobs.tolist()
    return [
        TopTokens(index, ids[row][:width], logprobs[row][:width])
        for index, row in enumerate(kept)
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
