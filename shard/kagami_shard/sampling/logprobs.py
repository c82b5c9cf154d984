"""Logprobs of the unprocessed distribution: of given tokens, and of the most likely ones.

Whoever computes the logits also computes every logprob of them, by one function: a token's logprob
then has the same bits whichever path chose the token.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Scorer(Protocol):
    """Computes logprobs, each row by itself: its bits do not depend on the other rows."""

    def choose_tokens(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The most likely id of each row, `[num_rows]` int64, and its logprob."""

    def logprobs(self, logits: Tensor, ids: Tensor) -> Tensor:
        """Those of `ids`, `[num_rows, ids_per_row]`; NaN where a row has no distribution."""


class TorchScorer:
    """On any device."""

    def choose_tokens(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """As `Scorer` says."""
        ids = logits.argmax(-1)
        return ids, self.logprobs(logits, ids[:, None])[:, 0]

    def logprobs(self, logits: Tensor, ids: Tensor) -> Tensor:
        """As `Scorer` says."""
        return logits.gather(-1, ids) - logits.logsumexp(-1, keepdim=True)


class Scores(NamedTuple):
    """What rows of logits say of one given token each; on the device."""

    logprobs: Tensor
    """`[num_rows]`"""
    top_ids: Tensor
    """`[num_rows, width]` int64, most likely first"""
    top_logprobs: Tensor


def score(logits: Tensor, token_ids: Tensor, width: int, scorer: Scorer) -> Scores:
    """The logprob of `token_ids[i]` under row i of `logits`, and the row's `width` most likely."""
    ids = token_ids[:, None]
    if width:
        top_ids = logits.topk(min(width, logits.shape[-1]), dim=-1).indices
        ids = torch.cat((ids, top_ids), dim=-1)
    logprobs = scorer.logprobs(logits, ids)
    return Scores(logprobs[:, 0], ids[:, 1:], logprobs[:, 1:])
