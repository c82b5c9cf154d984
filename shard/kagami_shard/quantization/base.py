"""What a weight is to a linear layer, and what the schemes share.

A `Weight` is a frozen dataclass of tensors, logically a matrix `[out, in]`. Its `linear` is the
reference: plain torch, on every device, right before fast; native kernels are tested against it.
A weight can be cut by rows and columns and laid below others of its kind, which is all that fused
layers and ranks need.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol, Self, TypeVar, cast

import torch
from torch import Tensor
from torch.nn.functional import linear

from kagami_shard.weights.sharding import Span

_INT8_MAX = 127


class Weight(Protocol):
    """A matrix `[out, in]` in some form."""

    @property
    def shape(self) -> tuple[int, int]: ...

    @property
    def num_bytes(self) -> int:
        """In this form."""

    def linear(self, hidden: Tensor) -> Tensor:
        """`[num_tokens, in]` to `[num_tokens, out]`, in the dtype of `hidden`."""

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The matrix that it stands for."""

    def rows(self, spans: Sequence[Span]) -> Self:
        """Copies of some rows, one span below the other."""

    def columns(self, span: Span) -> Self:
        """A copy of some columns."""

    def above(self, other: Self) -> Self | None:
        """`other` laid below this one; None where one object of this kind cannot hold both."""


@dataclass(frozen=True, slots=True)
class DenseWeight:
    """A matrix as it is."""

    values: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        return self.values.shape[0], self.values.shape[1]

    @property
    def num_bytes(self) -> int:
        return self.values.nbytes

    def linear(self, hidden: Tensor) -> Tensor:
        return linear(hidden, self.values.to(hidden.dtype))

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        return self.values.to(dtype)

    def rows(self, spans: Sequence[Span]) -> "DenseWeight":
        return DenseWeight(take_rows(self.values, spans))

    def columns(self, span: Span) -> "DenseWeight":
        return DenseWeight(take_columns(self.values, span))

    def above(self, other: "DenseWeight") -> "DenseWeight":
        return DenseWeight(torch.cat((self.values, other.values)))


def stack(weights: Sequence[Weight], dtype: torch.dtype) -> Weight:
    """All below one another; dequantized to `dtype` where their kinds or groups differ."""
    whole = weights[0]
    for weight in weights[1:]:
        joined = whole.above(weight) if type(weight) is type(whole) else None
        if joined is None:
            return DenseWeight(torch.cat([each.dequantized(dtype) for each in weights]))
        whole = joined
    return whole


@dataclass(frozen=True, slots=True)
class Groups:
    """Which columns of a matrix share a scale: `size` neighbours, or any by `of_column`."""

    num_columns: int
    size: int
    of_column: Tensor | None = None
    """`[num_columns]` int32, the group of each; None: groups of `size`, the last may be short"""

    @property
    def num_bytes(self) -> int:
        return bytes_of(self.of_column)

    def expand(self, by_group: Tensor) -> Tensor:
        """`[out, num_groups]` to `[out, num_columns]`."""
        if self.of_column is not None:
            return by_group.index_select(1, self.of_column)
        return by_group.repeat_interleave(self.size, dim=1)[:, : self.num_columns]

    def columns(self, span: Span) -> tuple["Groups", Span]:
        """Some columns' groups, and which of the old groups are left."""
        start, stop = span
        if self.of_column is None and start % self.size == 0:
            of_column = None
        else:
            of_column = self._group_of_each()[start:stop]
        first, last = (
            (start // self.size, -(-stop // self.size))
            if self.of_column is None
            else (int(of_column.min()), int(of_column.max()) + 1)  # type: ignore[union-attr]  # set
        )
        if of_column is not None:
            of_column = of_column - first
        return Groups(stop - start, self.size, of_column), (first, last)

    def agrees_with(self, other: "Groups") -> bool:
        """Whether both group the same columns together, in the same order."""
        if (self.num_columns, self.size) != (other.num_columns, other.size):
            return False
        if self.of_column is None or other.of_column is None:
            return self.of_column is other.of_column
        return torch.equal(self.of_column, other.of_column)

    def _group_of_each(self) -> Tensor:
        if self.of_column is not None:
            return self.of_column
        return torch.arange(self.num_columns, dtype=torch.int32) // self.size


def bytes_of(*tensors: Tensor | None) -> int:
    """All together; None has none."""
    return sum(tensor.nbytes for tensor in tensors if tensor is not None)


T = TypeVar("T")


def on_device(value: T, device: torch.device) -> T:
    """`value`, a weight or a part of one, with all its tensors on `device`."""
    if isinstance(value, Tensor):
        return cast(T, value.to(device))
    if isinstance(value, Groups) or hasattr(value, "linear"):
        data: Any = value
        moved = {each.name: on_device(getattr(data, each.name), device) for each in fields(data)}
        return cast(T, replace(data, **moved))
    return value


def take_rows(tensor: Tensor, spans: Sequence[Span]) -> Tensor:
    """Copies of rows, one span below the other."""
    return torch.cat([tensor[start:stop] for start, stop in spans])


def take_columns(tensor: Tensor, span: Span) -> Tensor:
    """A copy of columns."""
    return tensor[:, slice(*span)].clone(memory_format=torch.contiguous_format)


def quantize_activations(hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Every row in 8 bits by its largest value: int8 of the same shape, and `[rows, 1]` float32.

    Symmetric, round half to even; a row of zeros has the scale 1.
    """
    hidden = hidden.float()
    largest = hidden.abs().amax(dim=-1, keepdim=True)
    scale = torch.where(largest == 0, 1.0, largest / _INT8_MAX)
    values = (hidden / scale).round_().clamp_(-_INT8_MAX, _INT8_MAX)
    return values.to(torch.int8), scale
