"""8-bit weights with 8-bit activations (W8A8): LLM.int8's matmul without its outliers.

A scale for each output channel, symmetric, by its largest value; activations are quantized row by
row as they come (arXiv:2211.10438, "per-token dynamic"). Integers are multiplied, so the result
is exact up to these two roundings.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kagami_shard.quantization.base import quantize_activations, take_columns, take_rows
from kagami_shard.weights.sharding import Span

_MAX = 127


@dataclass(frozen=True, slots=True)
class Int8Weight:
    """`values * scales[:, None]`."""

    values: Tensor
    """`[out, in]` int8"""
    scales: Tensor
    """`[out]` float32"""

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape[0], self.values.shape[1]

    def linear(self, hidden: Tensor) -> Tensor:
        """Activations that are not finite give rows that are not."""
        values, scale = quantize_activations(hidden)
        return (int_matmul(values, self.values) * scale * self.scales).to(hidden.dtype)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        return (self.values.float() * self.scales[:, None]).to(dtype)

    def rows(self, spans: Sequence[Span]) -> "Int8Weight":
        return Int8Weight(take_rows(self.values, spans), take_rows(self.scales, spans))

    def columns(self, span: Span) -> "Int8Weight":
        return Int8Weight(take_columns(self.values, span), self.scales)

    def above(self, other: "Int8Weight") -> "Int8Weight":
        return Int8Weight(
            torch.cat((self.values, other.values)), torch.cat((self.scales, other.scales))
        )


def int_matmul(left: Tensor, right: Tensor) -> Tensor:
    """`left @ right.T` of two int8 matrices, in float32 from exact int32 sums."""
    if left.shape[0] == 0:
        return torch.zeros(0, right.shape[0], device=left.device)
    return torch._int_mm(left, right.t()).float()


def quantize_int8(matrix: Tensor) -> Int8Weight:
    """The nearest 8-bit weight of `matrix` `[out, in]`."""
    matrix = matrix.float()
    largest = matrix.abs().amax(dim=1)
    scales = torch.where(largest == 0, 1.0, largest / _MAX)
    values = (matrix / scales[:, None]).round_().clamp_(-_MAX, _MAX)
    return Int8Weight(values.to(torch.int8), scales)
