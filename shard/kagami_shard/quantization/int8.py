"""8-bit weights with 8-bit activations (W8A8).

A scale for each output channel, symmetric, by its largest value; activations are quantized row by
row as they come. Integers are multiplied, so the result is exact up to these two roundings.

A few columns of a model's activations are many times larger than the rest, and one scale for all
leaves the rest few steps. What is quantized at load is therefore turned: by a Hadamard matrix H in
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
# The blocks that are turned: as wide as this, if that divides the columns.
_WIDEST_TURN = 512
# Rows quantized at a time: the float32 temporaries stay small beside the weights.
_CHUNK_ROWS = 1024


@dataclass(frozen=True, slots=True)
class Int8Weight:
    """`values * scales[:, None]`, turned back."""

    values: Tensor
    """`[out, in]` int8"""
    scales: Tensor
    """`[out]` float32"""
    turn: int = 1
    """Columns of a block that is turned, a power of two; 1: none is"""

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape[0], self.values.shape[1]

    @property
    def num_bytes(self) -> int:
        return self.values.nbytes + self.scales.nbytes

    def linear(self, hidden: Tensor) -> Tensor:
        values, scale = quantize_activations(turned(hidden.float(), self.turn))
        return (int_matmul(values, self.values) * scale * self.scales).to(hidden.dtype)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        return turned(self.values.float() * self.scales[:, None], self.turn).to(dtype)

    def rows(self, spans: Sequence[Span]) -> "Int8Weight":
        scales = take_rows(self.scales, spans)
        return Int8Weight(take_rows(self.values, spans), scales, self.turn)

    def columns(self, span: Span) -> "Int8Weight":
        if span[0] % self.turn or span[1] % self.turn:
            return quantize_int8(self.dequantized(torch.float32)[:, slice(*span)])
        return Int8Weight(take_columns(self.values, span), self.scales, self.turn)

    def above(self, other: "Int8Weight") -> "Int8Weight | None":
        if self.turn != other.turn:
            return None
        values = torch.cat((self.values, other.values))
        return Int8Weight(values, torch.cat((self.scales, other.scales)), self.turn)


def int_matmul(left: Tensor, right: Tensor) -> Tensor:
    """`left @ right.T` of two int8 matrices, in float32 from exact int32 sums."""
    rows, out = left.shape[0], right.shape[0]
    if rows == 0:
        return torch.zeros(0, out, device=left.device)
    if left.shape[1] == 1:  # (m) for which torch 2.13's product is wrong
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
    """The nearest 8-bit weight of `matrix` `[out, in]`, turned as far as its columns divide."""
    turn = widest_turn(matrix.shape[1])
    parts = [_quantize(rows, turn) for rows in matrix.split(_CHUNK_ROWS)]
    values, scales = (torch.cat(each) for each in zip(*parts, strict=True))
    return Int8Weight(values, scales, turn)


def _quantize(matrix: Tensor, turn: int) -> tuple[Tensor, Tensor]:
    """Values and scales."""
    matrix = turned(matrix.float(), turn)
    largest = matrix.abs().amax(dim=1)
    scales = torch.where(largest == 0, 1.0, largest / _MAX)
    values = (matrix / scales[:, None]).round_().clamp_(-_MAX, _MAX)
    return values.to(torch.int8), scales


def widest_turn(num_columns: int) -> int:
    """The largest power of two that divides `num_columns`, up to `_WIDEST_TURN`."""
    return min(num_columns & -num_columns, _WIDEST_TURN)


def turned(matrix: Tensor, turn: int) -> Tensor:
    """`matrix` `[rows, in]` with every `turn` columns multiplied by the Hadamard matrix."""
    if turn == 1:
        return matrix
    rows, columns = matrix.shape
    blocks = matrix.reshape(rows * columns // turn, turn)
    product: Tensor = blocks @ _hadamard(turn, matrix.device)
    return product.view(rows, columns)


def _hadamard(turn: int, device: torch.device) -> Tensor:
    """Sylvester's, scaled to be orthogonal."""
    matrix = torch.ones(1, 1, device=device)
    while len(matrix) < turn:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix / math.sqrt(turn)
