"""A watermark in the choice of tokens (Kirchenbauer et al., arXiv:2301.10226, algorithm 2).

The token before decides which share of the vocabulary is green; green tokens get a bonus. Whoever
knows the rule counts the green tokens of a text. The list is a hash of (token before, token), the
same on every rank and device, and nothing is kept of a sequence.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kagami_shard.machine.device import to_device

# splitmix64's increment and multipliers (Steele, Lea, Flood: "Fast splittable pseudorandom number
# generators", OOPSLA 2014), as signed 64-bit numbers: torch's product wraps around.
_INCREMENT = 0x9E3779B97F4A7C15 - 2**64
_MIX1 = 0xBF58476D1CE4E5B9 - 2**64
_MIX2 = 0x94D049BB133111EB - 2**64
_UNIFORM_BITS = 31


@dataclass(frozen=True, slots=True)
class Watermark:
    """TGI's defaults."""

    gamma: float = 0.5
    """Share of the vocabulary that is green"""
    delta: float = 2.0
    """What is added to green logits"""


def green(last_ids: Tensor, vocab_size: int, gamma: float) -> Tensor:
    """What is green behind each of `last_ids`, `[num_rows]` int64: `[num_rows, vocab_size]`."""
    ids = torch.arange(vocab_size, device=last_ids.device)
    mixed = _mixed(_mixed(last_ids)[:, None] + ids)
    uniform = mixed.bitwise_and(2**_UNIFORM_BITS - 1)
    return uniform.less(int(gamma * 2**_UNIFORM_BITS))


def add_watermark(
    logits: Tensor, rows: Sequence[int], last_ids: Sequence[int], watermark: Watermark
) -> None:
    """Raise the green logits of `rows` in place; `last_ids` are the tokens before."""
    device = logits.device
    before = to_device(last_ids, dtype=torch.int64, device=device)
    index = to_device(rows, dtype=torch.int64, device=device)
    bonus = green(before, logits.shape[-1], watermark.gamma).to(logits.dtype)
    logits.index_add_(0, index, bonus, alpha=watermark.delta)


def _mixed(values: Tensor) -> Tensor:
    values = (values + 1) * _INCREMENT
    values = (values ^ _shifted(values, 30)) * _MIX1
    values = (values ^ _shifted(values, 27)) * _MIX2
    return values ^ _shifted(values, 31)


def _shifted(values: Tensor, count: int) -> Tensor:
    """A logical shift to the right; torch's own copies the sign."""
    return values.bitwise_right_shift(count).bitwise_and(2 ** (64 - count) - 1)
