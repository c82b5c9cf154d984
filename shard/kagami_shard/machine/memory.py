"""Memory: how much the KV cache may take, pages from the kernel, and which errors mean none."""

import errno
import mmap
import os
from contextlib import suppress
from pathlib import Path

import torch

from kagami_shard.machine import cgroup

# For what the measured step may not have shown: fragmentation, libraries' workspaces.
_CUDA_RESERVE = 0.03
# The rest is for the activations of larger steps, the page cache and everything else on the host.
_CPU_SHARE = 0.5
_NO_MEMORY = ("can't allocate memory", os.strerror(errno.ENOMEM))


def pool_bytes(device: torch.device, fraction: float, num_ranks: int) -> int:
    """Bytes that the KV cache may take on `device`.

    On CUDA `fraction` of the card belongs to this process; the peak that it had until now stays
    reserved. On the CPU it is `fraction` of half of the memory that the host (or the container's
    limit) has available, divided among the ranks, which share the host.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        reserved = torch.cuda.memory_reserved(device)
        peak = torch.cuda.max_memory_allocated(device)
        of_others = total - free - reserved
        allowed = min(total * fraction, total - of_others)
        return max(0, int(allowed - peak - total * _CUDA_RESERVE))
    return int(available_host_bytes() * _CPU_SHARE * fraction / num_ranks)


def fresh_pages(num_bytes: int) -> mmap.mmap:
    """Pages of zeros that take no memory until they are written; huge ones if the kernel has any.

    Raises OSError.
    """
    # Private: the kernel gives huge pages to no shared memory by default.
    pages = mmap.mmap(-1, num_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):
            pages.madvise(mmap.MADV_HUGEPAGE)
    return pages


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed: Python's, CUDA's, the kernel's, or torch's on the CPU."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    # torch's allocator and its mapping of a file have no class of their own.
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)


def available_host_bytes() -> int:
    """MemAvailable of /proc/meminfo, or what the control groups leave if that is less."""
    available = _meminfo("MemAvailable")
    limited = cgroup.available_bytes()
    return available if limited is None else min(available, limited)


def _meminfo(name: str) -> int:
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        key, _, rest = line.partition(":")
        if key == name:
            return int(rest.split()[0]) * 1024
    raise OSError(f"/proc/meminfo has no {name}")
