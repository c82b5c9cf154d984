"""What is done to logits before a token is drawn, vectorised over rows with their own parameters.

The order is TGI's: watermark, penalties, bias, grammar, temperature, top-k, top-p, typical-p.
Min-p, which TGI does not have, comes before top-k, as in vLLM.
Every function works row by row, so a row's result does not depend on its neighbours.
"""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from kagami_shard.machine.device import is_read_at_once, send, to_device
from kagami_shard.sampling.grammar import Banned

# The nucleus of real text lies within this many candidates; a row that needs more is sorted whole.
_CANDIDATES = 1024
# A bias of this size or more means "never" or "always". The value it gets is beyond what any
# model's logits differ by, and small enough that float32 tells two forced tokens apart by 0.001.
_ABSOLUTE_BIAS, _BEYOND_LOGITS = 100.0, 1e4


class History:
    """Which ids a sequence has used: {id: times in the output}, 0 for those in the prompt alone."""

    __slots__ = ("counts",)

    def __init__(self, ids: Sequence[int], num_prompt_tokens: int) -> None:
        self.counts = dict.fromkeys(ids[:num_prompt_tokens], 0)
        self.extend(ids[num_prompt_tokens:])

    def extend(self, ids: Iterable[int]) -> None:
        """Count sampled `ids`."""
        for token_id in ids:
            self.counts[token_id] = self.counts.get(token_id, 0) + 1


def penalize(
    logits: Tensor,
    rows: Sequence[int],
    histories: Sequence[History],
    repetition: Sequence[float],
    frequency: Sequence[float],
    presence: Sequence[float],
) -> None:
    """Lower in place what `rows` of `logits` (`[num_rows, vocab_size]`) have used already.

    Repetition (CTRL, arXiv:1909.05858, section 4.1) covers prompt and output: positive logits are
    divided, negative multiplied. Frequency and presence cover the output, as OpenAI defines them:
    `logit -= frequency * count + presence * (count > 0)`.
    """
    device = logits.device
    lengths = [len(history.counts) for history in histories]
    total = sum(lengths)
    sizes = to_device(lengths, dtype=torch.int64, device=device)

    def spread(values: Sequence[float], dtype: torch.dtype = logits.dtype) -> Tensor:
        per_row = to_device(values, dtype=dtype, device=device)
        return per_row.repeat_interleave(sizes, output_size=total)

    row = spread(rows, torch.int64)
    used = [key for history in histories for key in history.counts]
    times = [value for history in histories for value in history.counts.values()]
    ids = to_device(used, dtype=torch.int64, device=device)
    counts = to_device(times, dtype=logits.dtype, device=device)

    repeated = spread(repetition)
    chosen = logits[row, ids]
    chosen = torch.where(chosen < 0, chosen * repeated, chosen / repeated)
    chosen -= spread(frequency) * counts + spread(presence) * (counts > 0)
    logits[row, ids] = chosen


def add_bias(
    logits: Tensor, rows: Sequence[int], biases: Sequence[Sequence[tuple[int, float]]]
) -> None:
    """Add the (id, bias) pairs of `biases[i]` in place to row `rows[i]` of `logits`."""
    device = logits.device
    row = [row for row, pairs in zip(rows, biases, strict=True) for _ in pairs]
    ids = [token_id for pairs in biases for token_id, _ in pairs]
    values = [_bias_value(bias) for pairs in biases for _, bias in pairs]
    index = (
        to_device(row, dtype=torch.int64, device=device),
        to_device(ids, dtype=torch.int64, device=device),
    )
    logits.index_put_(index, to_device(values, dtype=logits.dtype, device=device), accumulate=True)


def _bias_value(bias: float) -> float:
    return bias if abs(bias) < _ABSOLUTE_BIAS else math.copysign(_BEYOND_LOGITS, bias)


def ban(logits: Tensor, banned: Banned) -> None:
    """Rule out in place what the grammars of some rows forbid."""
    mask = send(banned.mask, logits.device)
    if len(banned.rows) == len(logits):
        logits.masked_fill_(mask, float("-inf"))
        return
    for row, forbidden in zip(banned.rows, mask, strict=True):  # views: no row is copied
        logits[row].masked_fill_(forbidden, float("-inf"))


def keep_top(logits: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Mask `[num_rows, vocab_size]` of the tokens that top-k, then top-p, leave.

    `top_k` and `top_p` are `[num_rows]`; a top_k of at least vocab_size and a top_p of at least 1
    switch them off. Top-p (nucleus sampling, arXiv:1904.09751) keeps the most likely tokens up to
    and including the one at which their sum passes `top_p`.
    """
    if not is_read_at_once(logits.device):  # where a full sort is cheaper than the wait
        return _keep_among(logits, top_k, top_p, logits.shape[-1])[0]
    width = min(logits.shape[-1], _CANDIDATES)
    keep, covered = _keep_among(logits, top_k, top_p, width)
    if not covered.all():
        rest = ~covered
        keep[rest], _ = _keep_among(logits[rest], top_k[rest], top_p[rest], logits.shape[-1])
    return keep


def _keep_among(logits: Tensor, top_k: Tensor, top_p: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The mask from the `width` best candidates, and the rows for which those were enough."""
    values, ids = logits.topk(width, dim=-1)
    is_limited = top_k < logits.shape[-1]
    among_k = torch.arange(width, device=logits.device) < top_k[:, None]
    best_k = values.masked_fill(~among_k, float("-inf"))
    total = torch.where(is_limited, best_k.logsumexp(-1), logits.logsumexp(-1))
    probabilities = (best_k - total[:, None]).exp().double()
    running = probabilities.cumsum(-1)
    nucleus = (running - probabilities < top_p[:, None]) | (top_p >= 1)[:, None]
    keep = torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, ids, among_k & nucleus)
    enough = (is_limited & (top_k <= width)) | ((top_p < 1) & (running[:, -1] >= top_p))
    return keep, enough | (width == logits.shape[-1])


def keep_likely(logits: Tensor, min_p: Tensor) -> Tensor:
    """Mask of the tokens that min-p (arXiv:2407.01082) leaves.

    Those with at least `min_p`, `[num_rows]`, 0 to 1, of the likeliest token's probability.
    """
    return logits >= logits.amax(-1, keepdim=True) + min_p.log()[:, None]


def keep_typical(logits: Tensor, typical_p: Tensor) -> Tensor:
    """Mask of the tokens that locally typical sampling (arXiv:2202.00666) leaves.

    Tokens are taken in the order of how close their surprise is to the entropy of the row, up to
    and including the one at which their probabilities pass `typical_p`, `[num_rows]`.
    """
    logprobs = logits.log_softmax(-1)
    probabilities = logprobs.exp()
    entropy = -(probabilities * logprobs).nansum(-1, keepdim=True)
    distance = (-logprobs - entropy).abs()
    order = distance.argsort(dim=-1, stable=True)
    taken = probabilities.gather(-1, order).double()
    nucleus = taken.cumsum(-1) - taken < typical_p[:, None]
    return torch.zeros_like(logits, dtype=torch.bool).scatter_(-1, order, nucleus)
