"""The paged KV cache: its sizing, its tensors, block and slot arithmetic.

A block holds `block_size` tokens of one sequence in every layer; a slot is one token's place,
`block * block_size + offset` (PagedAttention, arXiv:2309.06180, section 4.2). Who holds which
block is the router's business. Block 0 is scratch: padding reads and writes there.

    keys[layer]    [num_blocks, block_size, num_kv_heads, head_dim]
    values[layer]  [num_blocks, block_size, num_kv_heads, value_dim]

Within a block a backend may have an order of its own, as the native one has (`native/cache.h`).
"""

import math
import mmap
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

import torch
from torch import Tensor

_HUGE_PAGE = 2 << 20


class LayerShape(NamedTuple):
    """What one layer keeps of one token."""

    num_kv_heads: int
    head_dim: int
    value_dim: int

    @property
    def size(self) -> int:
        return self.num_kv_heads * (self.head_dim + self.value_dim)


def block_bytes(layers: Sequence[LayerShape], block_size: int, dtype: torch.dtype) -> int:
    """Bytes of one block over all layers."""
    return block_size * dtype.itemsize * sum(layer.size for layer in layers)


def blocks_for(num_tokens: int, block_size: int) -> int:
    """How many blocks `num_tokens` tokens occupy."""
    return -(-num_tokens // block_size)


class KVCache:
    """The tensors of all layers; attention writes and reads through slots it is given."""

    def __init__(
        self,
        layers: Sequence[LayerShape],
        num_blocks: int,
        block_size: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.keys = [
            _zeros((num_blocks, block_size, layer.num_kv_heads, layer.head_dim), dtype, device)
            for layer in layers
        ]
        self.values = [
            _zeros((num_blocks, block_size, layer.num_kv_heads, layer.value_dim), dtype, device)
            for layer in layers
        ]

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self.keys, *self.values))

    def write(self, layer: int, slots: Tensor, key: Tensor, value: Tensor) -> None:
        """Store `[num_tokens, num_kv_heads, dim]` each at `slots`, `[num_tokens]`."""
        self.keys[layer].flatten(0, 1).index_copy_(0, slots, key)
        self.values[layer].flatten(0, 1).index_copy_(0, slots, value)

    def num_non_finite(self, blocks: Sequence[int]) -> Tensor:
        """`[len(blocks)]` int64: in how many of its tensors a block has a value that is not."""
        index = self._index(blocks)
        return torch.stack(
            [~tensor[index].isfinite().flatten(1).all(-1) for tensor in (*self.keys, *self.values)]
        ).sum(0)

    def clear(self, blocks: Sequence[int]) -> None:
        """Zero `blocks`."""
        index = self._index(blocks)
        for tensor in (*self.keys, *self.values):
            tensor[index] = 0

    def _index(self, blocks: Sequence[int]) -> Tensor:
        return torch.tensor(blocks, dtype=torch.int64, device=self.keys[0].device)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros, because masked reads of slots never written must be finite (0 x NaN is NaN).

    On the CPU they are fresh pages of the kernel, which take no memory until they are written;
    huge ones, because a step reads blocks all over them, and from the border of one on: else the
    first block takes two, and every tensor's end a part of the next one's.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    size = math.prod(shape) * dtype.itemsize
    # Private: the kernel gives huge pages to no shared memory by default.
    pages = mmap.mmap(-1, size + _HUGE_PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with suppress(OSError):  # a kernel without them
        pages.madvise(mmap.MADV_HUGEPAGE)
    start = -torch.frombuffer(pages, dtype=torch.uint8).data_ptr() % _HUGE_PAGE
    count = size // dtype.itemsize
    return torch.frombuffer(pages, dtype=dtype, count=count, offset=start).view(shape)
