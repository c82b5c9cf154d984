"""Rows of a matrix that still lie in the checkpoint's mapped files.

Whoever packs weights for the CPU's library reads them from there once, straight into their packed
form: a copy in torch's memory on the way would take a model's size of fresh memory, and as long as
the packing itself. Everybody else asks for the tensor.
"""

import ctypes
import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor


class StoredRows:
    """Views of mapped files, one below the other; nothing is read before it is asked for.

    The views keep their files mapped.
    """

    __slots__ = ("_parts", "_tensor", "device", "dtype", "shape")

    def __init__(
        self,
        parts: Sequence[Tensor],
        shape: tuple[int, ...],
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """`parts` are in their files' dtype, together of `shape`; the tensor is in `dtype`."""
        self._parts = tuple(parts)
        self.dtype = dtype
        self.device = device
        self._tensor: Tensor | None = None
        self.shape = shape

    def tensor(self) -> Tensor:
        """All in one tensor, cast: read by the first call, and kept; the files are let go."""
        if self._tensor is None:
            self._tensor, self._parts = self._read(), ()
        return self._tensor

    @property
    def num_bytes(self) -> int:
        """Of the tensor, whether it is in memory or not."""
        return math.prod(self.shape) * self.dtype.itemsize

    def in_place(self) -> tuple[Tensor, ...]:
        """In the tensor's dtype, and not kept: the parts as they lie, if they are in it."""
        if self._tensor is not None:
            return (self._tensor,)
        if all(part.dtype == self.dtype for part in self._parts):
            return self._parts
        return (self._read(),)

    def _read(self) -> Tensor:
        result = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        row = 0
        for part in self._parts:
            result[row : row + len(part)] = part
            row += len(part)
            drop_pages(part)
        return result

    def give_back(self) -> None:
        """The pages of the files, which have been read and are not needed again soon."""
        for part in self._parts:
            drop_pages(part)


Matrix = Tensor | StoredRows
"""Rows that are in memory, or that can be read"""


def tensor_of(matrix: Matrix) -> Tensor:
    """In memory."""
    return matrix if isinstance(matrix, Tensor) else matrix.tensor()


def drop_pages(part: Tensor) -> None:
    """Let the kernel take back the pages of a file that were mapped to read `part`.

    They stay in its page cache, but count as this process's memory while they are mapped: at the
    end of a load as much as the model. A part of a page that is shared with a neighbour stays.
    """
    if not part.is_contiguous():
        return
    start = -(-part.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    stop = (part.data_ptr() + part.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if start < stop:
        ctypes.CDLL(None).madvise(
            ctypes.c_void_p(start), ctypes.c_size_t(stop - start), mmap.MADV_DONTNEED
        )
