"""Where the library finds the KV cache."""

from collections.abc import Sequence
from ctypes import Array, addressof, c_void_p

from torch import Tensor

from kagami_shard.forward.kv_cache import KVCache


class PageTables:
    """The addresses of a cache's layers."""

    def __init__(self, cache: KVCache) -> None:
        self.cache = cache
        self._keys, self._values = _addresses(cache.keys), _addresses(cache.values)
        self.keys, self.values = addressof(self._keys), addressof(self._values)


def _addresses(tensors: Sequence[Tensor]) -> "Array[c_void_p]":
    return (c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))
