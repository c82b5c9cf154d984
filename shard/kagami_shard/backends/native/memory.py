"""Memory on huge pages, for packed weights.

Pages of 2 MiB save a step of 270 MB tens of thousands of address translations.
"""

import weakref

from kagami_shard.backends.native.library import Library

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
        """Handed out until now"""
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
