import ctypes

import torch
from torch import Tensor

from kagami_shard.bandwidth import weight_bytes
from kagami_shard.native.library import Library
from kagami_shard.native.memory import Arena, PackedWeight, Packer


def test_what_an_arena_handed_out_counts_as_weights(library: Library) -> None:
    arena = Arena(library)
    arena.take(5000)
    assert weight_bytes([arena, arena]) == 8192


def packed_bytes(packed: PackedWeight, num_rows: int) -> bytes:
    """Of a bf16 weight without padding."""
    return ctypes.string_at(packed.address, num_rows * packed.columns * 2)


def test_threads_pack_a_large_weight_as_one_packs_its_panels(library: Library) -> None:
    weight: Tensor = torch.randn(1024, 1024).bfloat16()
    packer = Packer(library)
    panels = [packed_bytes(packer.pack(panel, None), 32) for panel in weight.split(32)]
    assert packed_bytes(packer.pack(weight, None), 1024) == b"".join(panels)
