"""Memory on huge pages, and weights packed into it.

Pages of 2 MiB save a step of 270 MB tens of thousands of address translations. Weights are laid
one behind the other in the order of their use, so that a step reads one forward stream.
"""

import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kagami_shard.backends.native.library import CLinear, Library, WeightKind, pointer

_CHUNK_BYTES = 64 << 20
_ALIGNMENT = 4096


class Arena:
    """Hands out memory that lives as long as the arena."""

    def __init__(self, library: Library) -> None:
        self._library = library
        self._chunks: list[tuple[int, int]] = []
        self._next = 0
        self._end = 0
        self.num_bytes = 0
        """Handed out so far"""
        weakref.finalize(self, _free, library, self._chunks)

    def take(self, num_bytes: int) -> int:
        """The address of `num_bytes` zeros. Raises MemoryError."""
        num_bytes = -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
        if self._end - self._next < num_bytes:
            size = max(_CHUNK_BYTES, num_bytes)
            start = self._library.kg_huge_alloc(size)
            if not start:
                raise MemoryError(f"no memory for {size} bytes of packed weights")
            self._chunks.append((start, size))
            self._next, self._end = start, start + size
        address = self._next
        self._next += num_bytes
        self.num_bytes += num_bytes
        return address


def _free(library: Library, chunks: list[tuple[int, int]]) -> None:
    for address, size in chunks:
        library.kg_huge_free(address, size)


@dataclass(frozen=True, slots=True, eq=False)
class PackedWeight:
    """A weight as the library's kernels read it; other kinds of weight differ in `kind`."""

    kind: WeightKind
    rows: int
    columns: int
    address: int
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
        )


class Packer:
    """Packs weights one behind the other, each into the form that its projection chooses."""

    def __init__(self, library: Library) -> None:
        self.library = library
        self.arena = Arena(library)

    def pack(
        self, parts: Sequence[Tensor], bias: Tensor | None, *, gated: bool = False
    ) -> PackedWeight:
        """A bf16 weight, `[out, in]`, that lies in `parts`, one below the other.

        With `gated` its halves are a gate and what it opens.
        """
        parts = [part.contiguous() for part in parts]
        shape = (sum(map(len, parts)), parts[0].shape[1])
        packed = self._take(WeightKind.BF16, shape, 0, bias, gated=gated)
        rows = torch.cat([_row_addresses(part) for part in parts])
        self.library.kg_pack(pointer(rows), *shape, gated, packed.address)
        return packed

    def pack_int8(
        self, values: Tensor, scales: Tensor, bias: Tensor | None, *, gated: bool = False
    ) -> PackedWeight:
        """int8 `[out, in]`, and float32 scales `[out]`."""
        packed = self._take(WeightKind.INT8, values.shape, 0, bias, gated=gated)
        values, scales = values.contiguous(), scales.contiguous()
        self.library.kg_pack_int8(
            packed.struct(), pointer(values), pointer(scales), gated, packed.address
        )
        return packed

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
        self.library.kg_pack_int4(
            packed.struct(), pointer(codes), pointer(scales), pointer(zeros), gated, packed.address
        )
        return packed

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
        self.library.kg_pack_bytes(
            packed.struct(), pointer(codes), pointer(scales), pointer(zeros), gated, packed.address
        )
        return packed

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
        address = self.arena.take(self.library.kg_packed_bytes(layout))
        packed_bias = None
        if bias is not None:
            padded = self.library.kg_padded_rows(rows, gated)
            packed_bias = in_packed_order(bias.float(), padded, gated=gated)
        return PackedWeight(kind, rows, columns, address, self.arena, packed_bias, group)


def _row_addresses(part: Tensor) -> Tensor:
    """`[len(part)]` int64."""
    assert part.dtype == torch.bfloat16
    return part.data_ptr() + torch.arange(len(part)) * part.stride(0) * part.itemsize


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
