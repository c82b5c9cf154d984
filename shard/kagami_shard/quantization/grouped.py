"""Codes of 4 or 8 bits with a scale and a zero for each group of columns (weight-only).

What GPTQ (arXiv:2210.17323), AWQ (arXiv:2306.00978), compressed-tensors and our own int4 have in
common: `(code - zero) * scale`. Only how the files pack it differs, and their readers undo that.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from kagami_shard.quantization.base import Groups, bytes_of, take_columns, take_rows
from kagami_shard.weights.sharding import Span

ZERO_PARTS = 15
"""The CPU's library keeps zeros of 4-bit codes in so many parts of 1, one byte each: up to 17, and
whole ones exactly"""


@dataclass(frozen=True, slots=True)
class GroupedWeight:
    """`(codes - zeros) * scales`, both of the column's group."""

    bits: int
    """4: two columns in a byte, the even one low; 8: one"""
    packed: Tensor
    """`[out, in * bits / 8]` uint8"""
    scales: Tensor
    """`[out, num_groups]`, in the dtype of the checkpoint"""
    zeros: Tensor
    """`[out, num_groups]` float16: exact for whole numbers, and a zero need not be one"""
    groups: Groups

    @property
    def shape(self) -> tuple[int, int]:
        return self.packed.shape[0], self.groups.num_columns

    @property
    def num_bytes(self) -> int:
        return bytes_of(self.packed, self.scales, self.zeros) + self.groups.num_bytes

    def linear(self, hidden: Tensor) -> Tensor:
        return linear(hidden, self.dequantized(hidden.dtype))

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        codes = self.codes().float()
        zeros = self.groups.expand(self.zeros.float())
        return codes.sub_(zeros).mul_(self.groups.expand(self.scales.float())).to(dtype)

    def codes(self) -> Tensor:
        """`[out, in]` uint8."""
        if self.bits == 8:
            return self.packed
        return unpack_nibbles(self.packed)[:, : self.groups.num_columns]

    def rows(self, spans: Sequence[Span]) -> "GroupedWeight":
        return GroupedWeight(
            self.bits,
            take_rows(self.packed, spans),
            take_rows(self.scales, spans),
            take_rows(self.zeros, spans),
            self.groups,
        )

    def columns(self, span: Span) -> "GroupedWeight":
        groups, left = self.groups.columns(span)
        return make_grouped(
            self.bits,
            take_columns(self.codes(), span),
            take_columns(self.scales, left),
            take_columns(self.zeros, left),
            groups,
        )

    def above(self, other: "GroupedWeight") -> "GroupedWeight | None":
        if self.bits != other.bits or not self.groups.agrees_with(other.groups):
            return None
        return GroupedWeight(
            self.bits,
            torch.cat((self.packed, other.packed)),
            torch.cat((self.scales, other.scales)),
            torch.cat((self.zeros, other.zeros)),
            self.groups,
        )


def make_grouped(
    bits: int, codes: Tensor, scales: Tensor, zeros: Tensor, groups: Groups
) -> GroupedWeight:
    """A weight of `codes` `[out, in]`, uint8 each."""
    packed = pack_nibbles(codes) if bits == 4 else codes
    return GroupedWeight(bits, packed, scales, zeros.to(torch.float16), groups)


def pack_nibbles(codes: Tensor) -> Tensor:
    """Two columns in a byte, the even one low; a last odd one alone."""
    if codes.shape[1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


def unpack_nibbles(packed: Tensor) -> Tensor:
    """`[out, n]` uint8 to `[out, 2 n]`."""
    return torch.stack((packed & 15, packed >> 4), dim=2).flatten(1)
