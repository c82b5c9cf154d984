"""8-bit weights with 8-bit activations (W8A8).

A scale for each output channel, symmetric, by its largest value; activations are quantized row by
row as they come. Integers are multiplied, so the result is exact up to these two roundings.

A few columns of a model's activations are many times larger than the rest, and one scale for all
leaves the rest few steps. What is quantized at load is therefore rotated: by a Hadamard matrix H in
blocks of columns, orthogonal and its own inverse, `x W' = (x H) (W H)'`, which spreads the large
columns over their block (arXiv:2404.00456, and README.md for what it gains).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from kagami_shard.machine.device import ProductShape, int8_product_shape
from kagami_shard.quantization.base import quantize_activations, take_columns, take_rows
from kagami_shard.weights.sharding import Span

_MAX = 127
# The blocks that are rotated: as wide as this, if that divides the columns.
_WIDEST_BLOCK = 512
# Rows quantized at a time: the float32 temporaries stay small beside the weights.
_CHUNK_ROWS = 1024


@dataclass(frozen=True, slots=True)
class Int8Weight:
    """`values * scales[:, None]`, rotated back."""

    values: Tensor
    """`[out, in]` int8"""
    scales: Tensor
    """`[out]` float32"""
    hadamard_block: int = 1
    """Columns of a block that is rotated, a power of two; 1: none is"""

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape[0], self.values.shape[1]

    @property
    def num_bytes(self) -> int:
        return self.values.nbytes + self.scales.nbytes

    def linear(self, hidden: Tensor) -> Tensor:
        values, scale = quantize_activations(rotated(hidden.float(), self.hadamard_block))
        return (int_matmul(values, self.values) * scale * self.scales).to(hidden.dtype)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        return rotated(self.values.float() * self.scales[:, None], self.hadamard_block).to(dtype)

    def rows(self, spans: Sequence[Span]) -> "Int8Weight":
        scales = take_rows(self.scales, spans)
        return Int8Weight(take_rows(self.values, spans), scales, self.hadamard_block)

    def columns(self, span: Span) -> "Int8Weight":
        if span[0] % self.hadamard_block or span[1] % self.hadamard_block:
            return quantize_int8(self.dequantized(torch.float32)[:, slice(*span)])
        return Int8Weight(take_columns(self.values, span), self.scales, self.hadamard_block)

    def above(self, other: "Int8Weight") -> "Int8Weight | None":
        if self.hadamard_block != other.hadamard_block:
            return None
        values = torch.cat((self.values, other.values))
        return Int8Weight(values, torch.cat((self.scales, other.scales)), self.hadamard_block)


def int_matmul(left: Tensor, right: Tensor) -> Tensor:
    """`left @ right.T` of two int8 matrices, in float32 from exact int32 sums."""
    rows, out = left.shape[0], right.shape[0]
    if rows == 0:
        return torch.zeros(0, out, device=left.device)
    if left.shape[1] == 1:  # for which (measured) torch 2.13's product is wrong
        return left.float() * right[:, 0].float()
    left, right = fitted(left, right, int8_product_shape(left.device))
    return torch._int_mm(left, right.t())[:rows, :out].float()


def fitted(left: Tensor, right: Tensor, shape: ProductShape) -> tuple[Tensor, Tensor]:
    """Both with the zeros behind them that make them of such a `shape`."""
    columns = -left.shape[1] % shape.multiple
    return (
        _padded(left, max(0, shape.min_rows - left.shape[0]), columns),
        _padded(right, -right.shape[0] % shape.multiple, columns),
    )


def _padded(matrix: Tensor, rows: int, columns: int) -> Tensor:
    """Itself where nothing is missing: `pad` would copy a weight in every step."""
    return pad(matrix, (0, columns, 0, rows)) if rows or columns else matrix


def quantize_int8(matrix: Tensor) -> Int8Weight:
    """The nearest 8-bit weight of `matrix` `[out, in]`, rotated as far as its columns divide."""
    block = widest_block(matrix.shape[1])
    parts = [_quantize(rows, block) for rows in matrix.split(_CHUNK_ROWS)]
    values, scales = (torch.cat(each) for each in zip(*parts, strict=True))
    return Int8Weight(values, scales, block)


def _quantize(matrix: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Values and scales."""
    matrix = rotated(matrix.float(), block)
    largest = matrix.abs().amax(dim=1)
    scales = torch.where(largest == 0, 1.0, largest / _MAX)
    values = (matrix / scales[:, None]).round_().clamp_(-_MAX, _MAX)
    return values.to(torch.int8), scales


def widest_block(num_columns: int) -> int:
    """The largest power of two that divides `num_columns`, up to `_WIDEST_BLOCK`."""
    return min(num_columns & -num_columns, _WIDEST_BLOCK)


def rotated(matrix: Tensor, block: int) -> Tensor:
    """`matrix` `[rows, in]` with every `block` columns multiplied by the Hadamard matrix."""
    if block == 1:
        return matrix
    rows, columns = matrix.shape
    blocks = matrix.reshape(rows * columns // block, block)
    product: Tensor = blocks @ _hadamard(block, matrix.device)
    return product.view(rows, columns)


def _hadamard(block: int, device: torch.device) -> Tensor:
    """Sylvester's, scaled to be orthogonal."""
    matrix = torch.ones(1, 1, device=device)
    while len(matrix) < block:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix / math.sqrt(block)
