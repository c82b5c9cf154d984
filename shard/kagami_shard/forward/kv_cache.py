"""The paged KV cache: its sizing, its tensors, block and slot arithmetic.

A block holds `block_size` tokens of one sequence in every layer; a slot is one token's place,
`block * block_size + offset` (PagedAttention, arXiv:2309.06180, section 4.2). Who holds which
block is decided by the router. Block 0 is scratch: padding reads and writes there.

    keys[layer]    [num_blocks, block_size, num_kv_heads, head_dim]
    values[layer]  [num_blocks, block_size, num_kv_heads, value_dim]

Within a block a backend may use its own order, as the native one does (its `cache.h`).
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kagami_shard.machine.host_pages import HostPages


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
        pages: HostPages | None = None,
    ) -> None:
        """With `pages` the tensors lie in those, else torch allocates them on `device`."""
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._pages = pages

        def zeros(num_heads: int, dim: int) -> Tensor:
            shape = (num_blocks, block_size, num_heads, dim)
            if pages is not None:
                return pages.zeros(shape, dtype)
            return torch.zeros(shape, dtype=dtype, device=device)

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
        """`[len(blocks)]` int64: the number of its tensors in which a block is not finite."""
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
        """Take one more page of memory before a step needs it; False: there is no more to take."""
        return self._pages is not None and self._pages.take_ahead()

    def _index(self, blocks: Sequence[int]) -> Tensor:
        return torch.tensor(blocks, dtype=torch.int64, device=self.keys[0].device)
