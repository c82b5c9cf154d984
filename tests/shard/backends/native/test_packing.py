import ctypes
from collections.abc import Callable

import pytest
import torch
from tests.shard.backends.native.programs import Weights
from torch import Tensor

from kagami_shard.backends.native.library import Library, WeightKind
from kagami_shard.backends.native.packing import FORMS, PackedWeight, Packer, is_packable, pack
from kagami_shard.layers.linear import Linear, QuantizedLinear, RowLinear
from kagami_shard.machine.distributed import Alone
from kagami_shard.quantization.base import Groups
from kagami_shard.quantization.fp8 import quantize_fp8
from kagami_shard.quantization.grouped import make_grouped
from kagami_shard.quantization.int4 import quantize_int4
from kagami_shard.quantization.int8 import quantize_int8

CODES = torch.randint(0, 256, (2048, 1024), dtype=torch.uint8)
"""Two MiB: more than one thread packs so much"""
GROUPED = torch.rand(2048, 1024 // 32)

PACKERS: dict[str, Callable[[Packer, slice], PackedWeight]] = {
    "bf16": lambda packer, rows: packer.pack((CODES[rows].bfloat16(),), None),
    "int8": lambda packer, rows: packer.pack_int8(
        CODES[rows].view(torch.int8), GROUPED[rows, 0], None
    ),
    "int4": lambda packer, rows: packer.pack_int4(
        CODES[rows], GROUPED[rows].half(), GROUPED[rows].half(), None, num_columns=2048, group=64
    ),
    "8 bits in groups": lambda packer, rows: packer.pack_bytes(
        CODES[rows], GROUPED[rows], GROUPED[rows], None, group=32
    ),
}


def packed_bytes(library: Library, packed: PackedWeight) -> bytes:
    """Of a weight without padding; the library makes room for one panel more."""
    whole = library.kg_packed_bytes(packed.struct())
    num_panels = packed.rows // 32
    return ctypes.string_at(packed.address, whole // (num_panels + 1) * num_panels)


@pytest.mark.parametrize("form", PACKERS)
def test_threads_pack_a_large_weight_as_one_packs_its_panels(library: Library, form: str) -> None:
    packer, pack_rows = Packer(library), PACKERS[form]
    panels = [
        packed_bytes(library, pack_rows(packer, slice(i, i + 32))) for i in range(0, 2048, 32)
    ]
    assert packed_bytes(library, pack_rows(packer, slice(0, 2048))) == b"".join(panels)


def test_parts_are_packed_as_the_rows_of_one_weight(library: Library) -> None:
    packer, weight = Packer(library), CODES.bfloat16()
    parts = (weight[:5], weight[5:1037], weight[1037:])
    whole = packed_bytes(library, packer.pack((weight,), None, gated=True))
    assert packed_bytes(library, packer.pack(parts, None, gated=True)) == whole


# ---------------------------------------------------------------------- forms

MATRIX = torch.randn(40, 64, generator=torch.Generator().manual_seed(0))
PROJECTIONS: dict[WeightKind, Callable[[Tensor], Linear | QuantizedLinear]] = {
    WeightKind.BF16: lambda bias: Linear(MATRIX.bfloat16(), bias),
    WeightKind.INT8: lambda bias: QuantizedLinear(quantize_int8(MATRIX), bias),
    WeightKind.INT4: lambda bias: QuantizedLinear(quantize_int4(MATRIX), bias),
    WeightKind.FLOAT8: lambda bias: QuantizedLinear(quantize_fp8(MATRIX), bias),
}


@pytest.mark.parametrize("kind", PROJECTIONS)
def test_a_packed_weight_is_of_its_kind_and_the_layer_has_it_no_more(
    kind: WeightKind, library: Library
) -> None:
    packer, projection = Packer(library), PROJECTIONS[kind](torch.zeros(40))
    packed = pack(projection, packer)
    assert (packed.kind, packed.rows, packed.columns) == (kind, 40, 64)
    assert projection.matrix.num_bytes == 0
    assert packer.num_bytes == packer.arena.num_bytes + 4 * len(packed.bias)  # type: ignore[arg-type]  # it has one


def test_a_projection_that_lies_on_several_ranks_is_not_packable() -> None:
    part = Weights(0, torch.bfloat16).linear(3, 4)
    assert is_packable(part)
    assert not is_packable(RowLinear(part, None, Alone()))


def test_a_kind_of_weight_without_a_row_is_not_packable() -> None:
    class Unknown:
        shape = (1, 1)

    assert Unknown not in FORMS
    assert not is_packable(QuantizedLinear(Unknown()))  # type: ignore[arg-type]  # no weight


def packed_with_zeros_of(zero: float, library: Library) -> WeightKind:
    codes = torch.zeros(1, 32, dtype=torch.uint8)
    weight = make_grouped(4, codes, torch.ones(1, 1), torch.tensor([[zero]]), Groups(32, 32))
    return pack(QuantizedLinear(weight), Packer(library)).kind


@pytest.mark.parametrize("zero", [0.0, 3.2, 8.0, 16.0, 17.0])
def test_zeros_of_4_bits_that_fit_a_byte_in_fifteenths_stay_4_bits(
    zero: float, library: Library
) -> None:
    assert packed_with_zeros_of(zero, library) is WeightKind.INT4


@pytest.mark.parametrize("zero", [-0.2, 3.1, 17.2])
def test_weights_with_other_zeros_of_4_bits_become_bf16(zero: float, library: Library) -> None:
    assert packed_with_zeros_of(zero, library) is WeightKind.BF16
