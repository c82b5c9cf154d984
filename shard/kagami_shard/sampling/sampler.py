"""Draws one token for every row of a step.

Greedy rows take the argmax and skip everything else. Sampled rows invert the cumulative
distribution, in vocabulary order, at the one random number of (seed, position): rounding noise in
the logits then moves a draw only if the number lies within that noise of a token's border.
Logprobs are those of the unprocessed distribution (TGI's, taken after filtering, turn out 0 or
null where top_p is set).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kagami_proto.values import SamplingParams
from kagami_shard.machine.device import to_device
from kagami_shard.sampling.grammar import Banned
from kagami_shard.sampling.logprobs import Scorer, TorchScorer, score
from kagami_shard.sampling.philox import uniform
from kagami_shard.sampling.processors import (
    History,
    add_bias,
    ban,
    keep_likely,
    keep_top,
    keep_typical,
    penalize,
)
from kagami_shard.sampling.watermark import Watermark, add_watermark

_WATERMARK = Watermark()
_SCORER = TorchScorer()


class SamplingRow(NamedTuple):
    """One row of logits to draw from."""

    parameters: SamplingParams
    position: int
    """Of the token that is drawn, in its sequence"""
    history: History | None
    """None where no penalty is set"""
    top_n: int
    last_id: int = 0
    """The token before; right where `GenerationState.reads_last_id` says that it is read"""


class Drawn(NamedTuple):
    """On the device; nothing here waits for it."""

    token_ids: Tensor
    """`[num_rows]` int64"""
    logprobs: Tensor
    """`[num_rows]` float32; not finite where there was no distribution to draw from"""
    top_ids: Tensor
    """`[num_rows, max top_n]` int64, most likely first"""
    top_logprobs: Tensor


def draw(
    logits: Tensor,
    rows: Sequence[SamplingRow],
    *,
    banned: Banned | None = None,
    watermark: Watermark = _WATERMARK,
    scorer: Scorer = _SCORER,
) -> Drawn:
    """Draw one token per row of `logits`, `[num_rows, vocab_size]` float32, left unchanged."""
    processed = _processed(logits, rows, banned, watermark)
    if processed is logits and _are_greedy(rows):
        token_ids, logprobs = scorer.choose_tokens(logits)
        return Drawn(token_ids, logprobs, token_ids[:, None][:, :0], logits[:, :0])
    token_ids = processed.argmax(-1)
    is_there = torch.ones_like(token_ids, dtype=torch.bool)
    sampled = [index for index, row in enumerate(rows) if row.parameters.do_sample]
    if sampled:
        chosen = rows if len(sampled) == len(rows) else [rows[index] for index in sampled]
        index = to_device(sampled, dtype=torch.int64, device=logits.device)
        token_ids[index], is_there[index] = _draw_sampled(processed[index], chosen)
    scores = score(logits, token_ids, max((row.top_n for row in rows), default=0), scorer)
    logprobs = scores.logprobs.masked_fill(~is_there, float("nan")) if sampled else scores.logprobs
    return Drawn(token_ids, logprobs, scores.top_ids, scores.top_logprobs)


def _are_greedy(rows: Sequence[SamplingRow]) -> bool:
    return not any(row.parameters.do_sample or row.top_n for row in rows)


def _processed(
    logits: Tensor, rows: Sequence[SamplingRow], banned: Banned | None, watermark: Watermark
) -> Tensor:
    """What is chosen from: `logits` themselves where nothing changes them, else a copy."""
    marked = [index for index, row in enumerate(rows) if row.parameters.watermark]
    penalized = [index for index, row in enumerate(rows) if row.history is not None]
    biased = [index for index, row in enumerate(rows) if row.parameters.logit_bias]
    if not marked and not penalized and not biased and banned is None:
        return logits
    processed = logits.clone()
    if marked:
        add_watermark(processed, marked, [rows[index].last_id for index in marked], watermark)
    if penalized:
        _penalize(processed, penalized, rows)
    if biased:
        add_bias(processed, biased, [rows[index].parameters.logit_bias for index in biased])
    if banned is not None:
        ban(processed, banned)
    return processed


def _penalize(logits: Tensor, indices: Sequence[int], rows: Sequence[SamplingRow]) -> None:
    parameters = [rows[index].parameters for index in indices]
    penalize(
        logits,
        indices,
        [history for index in indices if (history := rows[index].history) is not None],
        [each.repetition_penalty for each in parameters],
        [each.frequency_penalty for each in parameters],
        [each.presence_penalty for each in parameters],
    )


def _draw_sampled(logits: Tensor, rows: Sequence[SamplingRow]) -> tuple[Tensor, Tensor]:
    """The drawn ids, and for which rows there was a distribution to draw from."""
    vocab_size, device = logits.shape[-1], logits.device
    parameters = [row.parameters for row in rows]

    def column(values: Sequence[float], dtype: torch.dtype = torch.float32) -> Tensor:
        return to_device(values, dtype=dtype, device=device)

    logits = logits / column([each.temperature for each in parameters])[:, None]
    likely = [i for i, each in enumerate(parameters) if each.min_p > 0]
    if likely:
        index = column(likely, torch.int64)
        keep = keep_likely(logits[index], column([parameters[i].min_p for i in likely]))
        logits[index] = logits[index].masked_fill_(~keep, float("-inf"))
    filtered = [i for i, each in enumerate(parameters) if each.top_k or each.top_p < 1]
    if filtered:
        index = column(filtered, torch.int64)
        top_k = [min(parameters[i].top_k or vocab_size, vocab_size) for i in filtered]
        top_p = [parameters[i].top_p for i in filtered]
        keep = keep_top(logits[index], column(top_k, torch.int64), column(top_p))
        logits[index] = logits[index].masked_fill_(~keep, float("-inf"))
    typical = [i for i, each in enumerate(parameters) if each.typical_p < 1]
    if typical:
        index = column(typical, torch.int64)
        keep = keep_typical(logits[index], column([parameters[i].typical_p for i in typical]))
        logits[index] = logits[index].masked_fill_(~keep, float("-inf"))
    numbers = [uniform(row.parameters.seed, row.position) for row in rows]
    cumulative = logits.double().softmax(-1).cumsum(-1)
    total = cumulative[:, -1]
    targets = column(numbers, torch.float64) * total
    found = torch.searchsorted(cumulative, targets[:, None], right=True)
    return found[:, 0].clamp_(max=vocab_size - 1), total.isfinite()
