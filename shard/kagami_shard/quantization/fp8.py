"""8-bit floats, e4m3 (arXiv:2209.05433): a scale for the matrix, each row, or each block.

No CPU multiplies them, so they are widened as they are used. Activations stay as they are: a scale
for them in the checkpoint is for hardware that needs it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from kagami_proto.errors import InvalidCheckpoint
from kagami_shard.quantization.base import Groups, take_columns, take_rows
from kagami_shard.weights.sharding import Span

FP8 = torch.float8_e4m3fn
_MAX = 448.0  # the largest finite e4m3


@dataclass(frozen=True, slots=True)
class Fp8Weight:
    """`values * scales`, the scale that of the column's group."""

    values: Tensor
    """`[out, in]` float8_e4m3fn"""
    scales: Tensor
    """`[out, num_groups]` float32"""
    groups: Groups

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape[0], self.values.shape[1]

    @property
    def num_bytes(self) -> int:
        return self.values.nbytes + self.scales.nbytes + self.groups.num_bytes

    def linear(self, hidden: Tensor) -> Tensor:
        return linear(hidden, self.dequantized(hidden.dtype))

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        return self.values.float().mul_(self.groups.expand(self.scales)).to(dtype)

    def rows(self, spans: Sequence[Span]) -> "Fp8Weight":
        values = take_rows(self.values.view(torch.uint8), spans).view(FP8)
        return Fp8Weight(values, take_rows(self.scales, spans), self.groups)

    def columns(self, span: Span) -> "Fp8Weight":
        groups, left = self.groups.columns(span)
        values = take_columns(self.values.view(torch.uint8), span).view(FP8)
        return Fp8Weight(values, take_columns(self.scales, left), groups)

    def above(self, other: "Fp8Weight") -> "Fp8Weight | None":
        if not self.groups.agrees_with(other.groups):
            return None
        values = torch.cat((self.values.view(torch.uint8), other.values.view(torch.uint8)))
        scales = torch.cat((self.scales, other.scales))
        return Fp8Weight(values.view(FP8), scales, self.groups)


def fp8_weight(values: Tensor, scales: Tensor, block: tuple[int, int] | None) -> Fp8Weight:
    """Of the scales as files have them: one, one a row (`[out]`, `[out, 1]`), one a block.

    `block` is the rows and columns of one, the last of each direction may be smaller. Raises
    `InvalidCheckpoint` where the shapes do not fit.
    """
    out, num_columns = values.shape
    check_scales(tuple(scales.shape), (out, num_columns), block)
    scales = scales.float()
    if block is None:
        scales = scales.reshape(-1, 1).expand(out, 1).contiguous()
        return Fp8Weight(values, scales, Groups(num_columns, num_columns))
    rows = torch.arange(out, device=scales.device) // block[0]
    return Fp8Weight(values, scales.index_select(0, rows), Groups(num_columns, block[1]))


def check_scales(
    scales: tuple[int, ...], weight: tuple[int, int], block: tuple[int, int] | None
) -> None:
    """Whether so many scales are one, one a row, or one a block of `weight`; raises
    `InvalidCheckpoint`.
    """
    if block is None:
        fits = math.prod(scales) in (1, weight[0])
    else:
        fits = scales == (-(-weight[0] // block[0]), -(-weight[1] // block[1]))
    if not fits:
        blocks = "" if block is None else f" in blocks of {block}"
        raise InvalidCheckpoint(f"scales of shape {scales} do not fit a weight of {weight}{blocks}")


def quantize_fp8(matrix: Tensor) -> Fp8Weight:
    """The nearest e4m3 weight of `matrix` `[out, in]` with a scale for each row."""
    matrix = matrix.float()
    largest = matrix.abs().amax(dim=1, keepdim=True)
    scales = torch.where(largest == 0, 1.0, largest / _MAX)
    return Fp8Weight((matrix / scales).to(FP8), scales, Groups(matrix.shape[1], matrix.shape[1]))
