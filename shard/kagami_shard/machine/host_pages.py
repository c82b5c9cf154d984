"""A CPU's memory for large tensors: huge pages that are taken when they are first written."""

import math

import torch
from torch import Tensor

from kagami_shard.machine.memory import fresh_pages

_HUGE_PAGE = 2 << 20
_MADV_POPULATE_WRITE = 23  # Linux 5.14; Python's mmap has no name for it


class HostPages:
    """Makes tensors of zeros that take no memory until they are written."""

    def __init__(self, ahead_share: float) -> None:
        """`take_ahead` may take `ahead_share` of each tensor before it is written."""
        self._ahead_share = ahead_share
        self._tensors: list[_Pages] = []

    def zeros(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor that begins at the border of a huge page. Raises OSError."""
        pages = _Pages(math.prod(shape) * dtype.itemsize)
        self._tensors.append(pages)
        return pages.tensor(shape, dtype)

    def take_ahead(self) -> bool:
        """Take the next page of the share that is taken ahead; False: all of it is taken.

        The first touch of a huge page takes some 5 ms. A step that reaches a new page reaches one
        in every tensor, and would wait for all of them.
        """
        try:
            return any(pages.take_page(self._ahead_share) for pages in self._tensors)
        except OSError:  # an older kernel
            self._tensors.clear()
            return False


class _Pages:
    """The memory of one tensor.

    It lies on huge pages, because a step reads blocks all over it. It begins at the border of a
    page: otherwise the first block would take two pages, and two tensors would share one.
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

    def take_page(self, share: float) -> bool:
        """Take the next page of the first `share` of this tensor; False: there is none."""
        if self._num_taken >= share * self._size / _HUGE_PAGE:
            return False
        start = self._start + self._num_taken * _HUGE_PAGE
        self._memory.madvise(_MADV_POPULATE_WRITE, start, _HUGE_PAGE)
        self._num_taken += 1
        return True
