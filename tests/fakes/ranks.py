"""Ranks as threads of one process: the collectives are Gloo's, and no process has to start."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch.distributed as dist

from kagami_shard.machine.distributed import Group, _gloo

T = TypeVar("T")


def run_ranks(size: int, function: Callable[[Group], T]) -> list[T]:
    """What `function` returns on every rank, called with the rank's group."""
    store = dist.HashStore()

    def run(rank: int) -> T:
        backend = _gloo(store, rank, size, is_local=True)
        return function(Group(backend, store, rank, size))

    with ThreadPoolExecutor(size) as threads:
        return list(threads.map(run, range(size)))
