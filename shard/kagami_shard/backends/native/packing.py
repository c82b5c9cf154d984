"""Weights in the order in which the library's kernels read them.

`FORMS` has a row for every kind of weight that can be packed: a new kind is a row here, a method of
`Packer`, and a panel in the library. Weights are laid one behind the other in the order of their
use, so that a step reads one forward stream.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor

from kagami_shard.backends.native.library import (
    CLinear,
    CRows,
    Library,
    WeightKind,
    count_of,
    pointer,
    span_of,
)
from kagami_shard.backends.native.memory import Arena
from kagami_shard.layers.linear import Linear, Projection, QuantizedLinear
from kagami_shard.quantization.base import DenseWeight, Groups
from kagami_shard.quantization.fp8 import Fp8Weight
from kagami_shard.quantization.grouped import ZERO_PARTS, GroupedWeight
from kagami_shard.quantization.int8 import Int8Weight
from kagami_shard.weights.stored import StoredRows

_E4M3_NAN = 0x7F  # with either sign

Packable = Linear | QuantizedLinear
"""A projection whose weight may have a packed form"""


@dataclass(frozen=True, slots=True, eq=False)
class PackedWeight:
    """A weight as the library's kernels read it; other kinds of weight differ in `kind`."""

    kind: WeightKind
    rows: int
    columns: int
    address: int
    num_bytes: int
    """From there on"""
    arena: Arena
    """Which owns the address"""
    bias: Tensor | None = None
    """float32, in the order of the packed rows, padded"""
    group: int = 0
    """Columns that share a scale; 0: not in groups"""

    def struct(self) -> CLinear:
        """For an op's `params`; holds pointers into this weight."""
        return CLinear(
            kind=self.kind,
            rows=self.rows,
            columns=self.columns,
            group=self.group,
            weight=self.address,
            bias=pointer(self.bias),
            weight_bytes=self.num_bytes,
            bias_count=count_of(self.bias),
        )


class Packer:
    """Packs weights one behind the other."""

    def __init__(self, library: Library) -> None:
        self.library = library
        self.arena = Arena(library)
        self._bias_bytes = 0

    @property
    def num_bytes(self) -> int:
        """Bytes of all that was packed."""
        return self.arena.num_bytes + self._bias_bytes

    def pack(
        self, parts: Sequence[Tensor], bias: Tensor | None, *, gated: bool = False
    ) -> PackedWeight:
        """A bf16 weight, `[out, in]`, that lies in `parts`, one below the other.

        With `gated` its halves are a gate and what it opens.
        """
        parts = [part.contiguous() for part in parts]
        shape = (sum(map(len, parts)), parts[0].shape[1])
        packed = self._take(WeightKind.BF16, shape, 0, bias, gated=gated)
        rows = (CRows * len(parts))(*map(_rows, parts))
        return _checked(self.library.kg_pack(packed.struct(), rows, len(parts), gated), packed)

    def pack_int8(
        self, values: Tensor, scales: Tensor, bias: Tensor | None, *, gated: bool = False
    ) -> PackedWeight:
        """int8 `[out, in]`, and float32 scales `[out]`."""
        packed = self._take(WeightKind.INT8, values.shape, 0, bias, gated=gated)
        values, scales = values.contiguous(), scales.contiguous()
        spans = (span_of(values), span_of(scales))
        return _checked(self.library.kg_pack_int8(packed.struct(), *spans, gated), packed)

    def pack_int4(
        self,
        codes: Tensor,
        scales: Tensor,
        zeros: Tensor,
        bias: Tensor | None,
        *,
        num_columns: int,
        group: int,
        gated: bool = False,
    ) -> PackedWeight:
        """Codes two in a byte, `[out, in / 2]`, float16 scales and zeros `[out, num_groups]`.

        `group` is a multiple of 32. Zeros are kept in parts of 1, see `grouped.ZERO_PARTS`.
        """
        shape = (codes.shape[0], num_columns)
        packed = self._take(WeightKind.INT4, shape, group, bias, gated=gated)
        codes, scales, zeros = codes.contiguous(), scales.contiguous(), zeros.contiguous()
        spans = (span_of(codes), span_of(scales), span_of(zeros))
        return _checked(self.library.kg_pack_int4(packed.struct(), *spans, gated), packed)

    def pack_bytes(
        self,
        codes: Tensor,
        scales: Tensor,
        zeros: Tensor | None,
        bias: Tensor | None,
        *,
        group: int,
        gated: bool = False,
    ) -> PackedWeight:
        """Codes of 8 bits, uint8 `[out, in]`, float32 scales and zeros `[out, num_groups]`.

        With zeros they are whole numbers, without e4m3, none of them NaN. `group` is a multiple of
        32.
        """
        kind = WeightKind.FLOAT8 if zeros is None else WeightKind.GROUPED8
        packed = self._take(kind, codes.shape, group, bias, gated=gated)
        codes, scales = codes.contiguous(), scales.contiguous()
        zeros = None if zeros is None else zeros.contiguous()
        spans = (span_of(codes), span_of(scales), span_of(zeros))
        return _checked(self.library.kg_pack_bytes(packed.struct(), *spans, gated), packed)

    def _take(
        self,
        kind: WeightKind,
        shape: Sequence[int],
        group: int,
        bias: Tensor | None,
        *,
        gated: bool,
    ) -> PackedWeight:
        """Room for a weight, with its bias in order."""
        rows, columns = shape
        layout = CLinear(kind=kind, rows=rows, columns=columns, group=group)
        num_bytes = self.library.kg_packed_bytes(layout)
        if num_bytes < 0:
            raise ValueError(f"the library packs no {kind.name} weight of {rows} x {columns}")
        address = self.arena.take(num_bytes)
        packed_bias = None
        if bias is not None:
            padded = self.library.kg_padded_rows(rows, gated)
            packed_bias = in_packed_order(bias.float(), padded, gated=gated)
            self._bias_bytes += packed_bias.nbytes
        return PackedWeight(kind, rows, columns, address, num_bytes, self.arena, packed_bias, group)


def _checked(refused: int, packed: PackedWeight) -> PackedWeight:
    """Raises ValueError where the library has found another size than `packed` says."""
    if refused:
        raise ValueError(
            f"the library refuses the tensors of a {packed.kind.name} weight of "
            f"{packed.rows} x {packed.columns}: their sizes are others"
        )
    return packed


def _rows(part: Tensor) -> CRows:
    assert part.dtype == torch.bfloat16
    return CRows(pointer(part), *part.shape, part.stride(0), part.nbytes)


def in_packed_order(rows: Tensor, padded: int, *, gated: bool) -> Tensor:
    """One value for each row of a weight, as the packed weight has its rows; zeros for padding."""
    result = rows.new_zeros(padded)
    if not gated:
        result[: len(rows)] = rows
        return result
    half = len(rows) // 2
    pairs = result.view(-1, 2, 16)
    for index in range(2):
        side = rows.new_zeros(len(pairs) * 16)
        side[:half] = rows[index * half : (index + 1) * half]
        pairs[:, index] = side.view(-1, 16)
    return result


# ---------------------------------------------------------------------- forms


def _dense(packer: Packer, weight: DenseWeight, bias: Tensor | None, gated: bool) -> PackedWeight:
    return packer.pack((weight.dequantized(torch.bfloat16),), bias, gated=gated)


def _stored(packer: Packer, rows: StoredRows, bias: Tensor | None, gated: bool) -> PackedWeight:
    """From the files: there is never a copy beside the packed weight."""
    packed = packer.pack(rows.in_place(), bias, gated=gated)
    rows.give_back()
    return packed


def _int8(packer: Packer, weight: Int8Weight, bias: Tensor | None, gated: bool) -> PackedWeight:
    return packer.pack_int8(weight.values, weight.scales, bias, gated=gated)


def _packable_size(groups: Groups) -> int | None:
    """Columns of a group, if the library can read such groups: neighbours, in steps of 32."""
    size = groups.size if groups.size < groups.num_columns else -(-groups.num_columns // 32) * 32
    return None if groups.of_column is not None or size % 32 else size


def _fits_int4(weight: GroupedWeight) -> bool:
    """Whether scales are float16 and zeros a byte of `ZERO_PARTS`, as the library has them."""
    as_halves = weight.scales.half().to(weight.scales.dtype)
    as_bytes = (weight.zeros.float() * ZERO_PARTS).round().clamp(0, 255)
    as_zeros = (as_bytes / ZERO_PARTS).half()
    return torch.equal(as_halves, weight.scales) and torch.equal(as_zeros, weight.zeros)


def _grouped(
    packer: Packer, weight: GroupedWeight, bias: Tensor | None, gated: bool
) -> PackedWeight | None:
    """Codes of regular groups."""
    group = _packable_size(weight.groups)
    if group is None or (weight.bits == 4 and not _fits_int4(weight)):
        return None
    if weight.bits == 4:
        return packer.pack_int4(
            weight.packed,
            weight.scales.half(),
            weight.zeros,
            bias,
            num_columns=weight.shape[1],
            group=group,
            gated=gated,
        )
    scales, zeros = weight.scales.float(), weight.zeros.float()
    return packer.pack_bytes(weight.packed, scales, zeros, bias, group=group, gated=gated)


def _fp8(
    packer: Packer, weight: Fp8Weight, bias: Tensor | None, gated: bool
) -> PackedWeight | None:
    """e4m3 in regular groups; the library knows no NaN."""
    codes = weight.values.view(torch.uint8)
    group = _packable_size(weight.groups)
    if group is None or bool(((codes & _E4M3_NAN) == _E4M3_NAN).any()):
        return None
    return packer.pack_bytes(codes, weight.scales, None, bias, group=group, gated=gated)


class Form(NamedTuple):
    """How a kind of weight is packed."""

    pack: Callable[[Packer, Any, Tensor | None, bool], PackedWeight | None]
    """None where the library cannot hold this one: it becomes bf16 then"""
    hadamard_block: Callable[[Any], int] | None = None
    """How wide the rotated blocks are, if the kind multiplies activations in 8 bits"""


FORMS: Mapping[type, Form] = MappingProxyType(
    {
        DenseWeight: Form(_dense),
        StoredRows: Form(_stored),
        Int8Weight: Form(_int8, lambda weight: weight.hadamard_block),
        GroupedWeight: Form(_grouped),
        Fp8Weight: Form(_fp8),
    }
)


def is_packable(projection: Projection) -> TypeGuard[Packable]:
    return isinstance(projection, Packable) and type(projection.matrix) in FORMS


def hadamard_block(projection: Packable) -> int:
    """0: it reads bf16; else activations in 8 bits, rotated in blocks of so many columns."""
    block = FORMS[type(projection.matrix)].hadamard_block
    return block(projection.matrix) if block else 0


def pack(projection: Packable, packer: Packer, *, gated: bool = False) -> PackedWeight:
    """The weight as the library reads it; `projection` gives its own away.

    With `gated` the two halves of the output are a gate and what it opens.
    """
    matrix, bias = projection.matrix, projection.bias
    packed = FORMS[type(matrix)].pack(packer, matrix, bias, gated)
    if packed is None:
        assert not isinstance(matrix, StoredRows)
        packed = _dense(packer, DenseWeight(matrix.dequantized(torch.bfloat16)), bias, gated)
    projection.give_away()
    return packed
