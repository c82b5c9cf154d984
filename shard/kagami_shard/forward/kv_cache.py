"""The paged KV cache: its sizing, its tensors, block and slot arithmetic.

A block holds `block_size` tokens of one sequence in every layer; a slot is one token's place,
`block * block_size + offset` (PagedAttention, arXiv:2309.06180, section 4.2). Who holds which
block is the router's business. Block 0 is scratch: padding reads and writes there.

    keys[layer]    [num_blocks, block_size, num_kv_heads, head_dim]
    values[layer]  [num_blocks, block_size, num_kv_heads, value_dim]

Within a block a backend may have an order of its own, as the native one has (its `cache.h`).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kagami_shard.machine.memory import fresh_pages

_HUGE_PAGE = 2 << 20
_MADV_POPULATE_WRITE = 23  # Linux 5.14; Python's mmap has no name for it
# Of a CPU's cache, taken before it is written to. The router lets cached prefixes have as much.
_AHEAD_SHARE = 0.25


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
        self._fresh: list[_FreshPages] = []

        def zeros(num_heads: int, dim: int) -> Tensor:
            shape = (num_blocks, block_size, num_heads, dim)
            if device.type != "cpu":
                return torch.zeros(shape, dtype=dtype, device=device)
            pages = _FreshPages(math.prod(shape) * dtype.itemsize)
            self._fresh.append(pages)
            return pages.tensor(shape, dtype)

        # Zeros, because masked reads of slots never written must be finite (0 x NaN is NaN).
        self.keys = [zeros(layer.num_kv_heads, layer.head_dim) for layer in layers]
        self.values = [zeros(layer.num_kv_heads, layer.value_dim) for layer in layers]

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

    def take_ahead(self) -> bool:
        """On a CPU: take a page of memory for the first quarter of the blocks; False: it has all.

        The first touch of a huge page takes some 5 ms, and a step that comes to a new one comes to
        one of each tensor.
        """
        try:
            return any(pages.take_page() for pages in self._fresh)
        except OSError:  # an older kernel
            self._fresh.clear()
            return False

    def _index(self, blocks: Sequence[int]) -> Tensor:
        return torch.tensor(blocks, dtype=torch.int64, device=self.keys[0].device)


class _FreshPages:
    """A CPU's memory for a tensor: zeros that take no memory until they are written.

    On huge pages, because a step reads blocks all over them, and from the border of one on: else
    the first block takes two, and every tensor's end a part of the next one's.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._memory = fresh_pages(size + _HUGE_PAGE)
        address = torch.frombuffer(self._memory, dtype=torch.uint8).data_ptr()
        self._start = -address % _HUGE_PAGE
        self._num_taken = 0

    def tensor(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        count = math.prod(shape)
        flat = torch.frombuffer(self._memory, dtype=dtype, count=count, offset=self._start)
        return flat.view(shape)

    def take_page(self) -> bool:
        """Take the next page of those that are taken ahead; False: there is none."""
        if self._num_taken >= _AHEAD_SHARE * self._size / _HUGE_PAGE:
            return False
        start = self._start + self._num_taken * _HUGE_PAGE
        self._memory.madvise(_MADV_POPULATE_WRITE, start, _HUGE_PAGE)
        self._num_taken += 1
        return True
