import ctypes
from collections.abc import Callable

import pytest
import torch

from kagami_shard.backends.native.library import Library
from kagami_shard.backends.native.memory import Arena, PackedWeight, Packer
from kagami_shard.machine.bandwidth import weight_bytes


def test_what_an_arena_handed_out_counts_as_weights(library: Library) -> None:
    arena = Arena(library)
    arena.take(5000)
    assert weight_bytes([arena, arena]) == 8192


CODES = torch.randint(0, 256, (2048, 1024), dtype=torch.uint8)
"""Two MiB: more than one thread packs so much"""
GROUPED = torch.rand(2048, 1024 // 32)

FORMS: dict[str, Callable[[Packer, slice], PackedWeight]] = {
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


@pytest.mark.parametrize("form", FORMS)
def test_threads_pack_a_large_weight_as_one_packs_its_panels(library: Library, form: str) -> None:
    packer, pack = Packer(library), FORMS[form]
    panels = [packed_bytes(library, pack(packer, slice(i, i + 32))) for i in range(0, 2048, 32)]
    assert packed_bytes(library, pack(packer, slice(0, 2048))) == b"".join(panels)


def test_parts_are_packed_as_the_rows_of_one_weight(library: Library) -> None:
    packer, weight = Packer(library), CODES.bfloat16()
    parts = (weight[:5], weight[5:1037], weight[1037:])
    whole = packed_bytes(library, packer.pack((weight,), None, gated=True))
    assert packed_bytes(library, packer.pack(parts, None, gated=True)) == whole
