"""Logprobs of the unprocessed distribution: of given tokens, and of the most likely ones."""

from typing import NamedTuple

from torch import Tensor


class Scores(NamedTuple):
    """What rows of logits say of one given token each; on the device."""

    logprobs: Tensor
    """`[num_rows]`"""
    top_ids: Tensor
    """`[num_rows, width]` int64, most likely first"""
    top_logprobs: Tensor


def score(logits: Tensor, token_ids: Tensor, width: int) -> Scores:
    """The logprob of `token_ids[i]` under row i of `logits`, and the row's `width` most likely."""
    normalizer = logits.logsumexp(-1, keepdim=True)
    chosen = logits.gather(-1, token_ids[:, None]) - normalizer
    if width:
        top_logits, top_ids = logits.topk(min(width, logits.shape[-1]), dim=-1)
    else:
        top_logits, top_ids = logits[:, :0], token_ids[:, None][:, :0]
    return Scores(chosen[:, 0], top_ids, top_logits - normalizer)
