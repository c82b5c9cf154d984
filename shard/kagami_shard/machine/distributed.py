"""The ranks of one model: how they meet, and the collectives they compute with.

Every rank is a process (one GPU each, or a share of the CPU) and gets the same steps from the
router, so all ranks call the same collectives in the same order. Only tensors travel between them
and, after an exception, one count. What a collective returns has the same bits on every rank: a sum
is computed once and sent to all, gathered parts are copies. The caller of `connect` owns the group:
torch's process-wide default group is not used.
"""

import errno
import logging
import socket
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from kagami_proto.errors import RankLost

logger = logging.getLogger(__name__)

# Ranks start together and meet before they load; a rank's own start is importing torch.
_MEET_S = 600.0
# Between two collectives lies half a layer of one step: a rank that is later has lost its way.
_COLLECTIVE_S = 60.0
# An error that all ranks have reaches them within a step of each other.
_AGREE_S = 5.0
_POLL_S = 0.01
_LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})


class Collective(Protocol):
    """A collective that was started; on a GPU, waiting for it only orders the streams."""

    def wait(self) -> bool: ...


class ProcessGroup(Protocol):
    """The part of torch's process groups that is used here; torch's stubs do not declare it."""

    def allreduce(self, tensors: list[Tensor]) -> Collective: ...

    def broadcast(self, tensors: list[Tensor], options: dist.BroadcastOptions) -> Collective: ...

    def _allgather_base(self, parts: Tensor, tensor: Tensor) -> Collective: ...


class Store(Protocol):
    """Strings by name, shared by all ranks."""

    def set(self, key: str, value: str, /) -> None: ...

    def get(self, key: str, /) -> bytes: ...

    def check(self, keys: list[str], /) -> bool: ...

    def wait(self, keys: list[str], timeout: timedelta, /) -> None: ...


class TensorParallel(Protocol):
    """This process's place among the ranks that compute one model together."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The sum over all ranks, in place where that is possible."""

    def all_gather(self, tensor: Tensor) -> Tensor:
        """`[rows, width]` of every rank beside one another: `[rows, size * width]`."""

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Rank 0's tensor, on every rank."""

    def together(self) -> AbstractContextManager[None]:
        """A scope. Its exception passes if all ranks have one, else it becomes `RankLost`."""


class Alone:
    """One rank alone: every collective returns its argument."""

    rank = 0
    size = 1

    def all_reduce(self, tensor: Tensor) -> Tensor:
        return tensor

    def all_gather(self, tensor: Tensor) -> Tensor:
        return tensor

    def broadcast(self, tensor: Tensor) -> Tensor:
        return tensor

    def together(self) -> AbstractContextManager[None]:
        return nullcontext()


class Group:
    """Several ranks over `backend`; they meet at `store` when a step failed.

    Empty tensors, such as logits that nobody wants, are not sent.

    If one rank never calls a collective, it ends on the others after the backend's time-out: Gloo
    raises (at once, if the other process is gone), NCCL's watchdog ends the process.
    """

    def __init__(self, backend: ProcessGroup, store: Store, rank: int, size: int) -> None:
        self.rank = rank
        self.size = size
        self._backend = backend
        self._store = store
        self._num_calls = 0
        self._num_failures = 0

    def all_reduce(self, tensor: Tensor) -> Tensor:
        if not tensor.numel():
            return tensor
        self._num_calls += 1
        tensor = tensor.contiguous()
        self._backend.allreduce([tensor]).wait()
        return tensor

    def all_gather(self, tensor: Tensor) -> Tensor:
        rows, width = tensor.shape
        if not rows:
            return tensor.new_empty((0, self.size * width))
        self._num_calls += 1
        parts = tensor.new_empty((self.size * rows, width))
        self._backend._allgather_base(parts, tensor.contiguous()).wait()
        return parts.view(self.size, rows, width).transpose(0, 1).reshape(rows, -1)

    def broadcast(self, tensor: Tensor) -> Tensor:
        self._num_calls += 1
        tensor = tensor.contiguous()
        options = dist.BroadcastOptions()
        options.rootRank = 0
        self._backend.broadcast([tensor], options).wait()
        return tensor

    @contextmanager
    def together(self) -> Iterator[None]:
        """Pass an exception on if every rank has one after the same number of collectives.

        Then no collective hangs half done, and all ranks fail the same step and go on. Otherwise
        this rank cannot know what the others do, and raises `RankLost`.
        """
        try:
            yield
        except Exception as error:
            if not self._have_all_failed():
                text = " ".join(str(error).split()) or type(error).__name__
                raise RankLost(
                    f"rank {self.rank} is out of step with the others: {text}"
                ) from error
            raise

    def _have_all_failed(self) -> bool:
        self._num_failures += 1
        keys = [f"failure/{self._num_failures}/{rank}" for rank in range(self.size)]
        mine = str(self._num_calls)
        deadline = time.monotonic() + _AGREE_S
        try:
            self._store.set(keys[self.rank], mine)
            while not self._store.check(keys):
                if time.monotonic() > deadline:
                    return False
                time.sleep(_POLL_S)
            return all(self._store.get(key) == mine.encode() for key in keys)
        except RuntimeError:  # the store lived in rank 0, which is gone
            return False


def connect(
    rank: int, size: int, *, address: str, port: int, device: torch.device
) -> TensorParallel:
    """Meet the other ranks at `address:port`, where rank 0 listens; raises `RankLost`.

    Over NCCL on a GPU, which must be this process's alone, over Gloo on a CPU.
    """
    if size == 1:
        return Alone()
    if device.type == "cuda" and size > (num_devices := torch.cuda.device_count()):
        raise RankLost(
            f"Each process is one gpu: there are {size} shards and {num_devices} visible devices"
        )
    logger.info("Waiting for all %d ranks at %s:%d", size, address, port, extra={"rank": rank})
    try:
        store = _store(rank, size, address, port)
        if device.type == "cuda":
            backend = _nccl(store, rank, size)
        else:
            backend = _gloo(store, rank, size, is_local=address in _LOOPBACK)
        group = Group(backend, store, rank, size)
        group.all_reduce(torch.zeros(1, device=device))
    except RuntimeError as error:  # what torch.distributed raises, of any kind
        line = str(error).strip().partition("\n")[0]
        raise RankLost(f"rank {rank} cannot meet the others at {address}:{port}: {line}") from error
    return group


def _store(rank: int, size: int, address: str, port: int) -> Store:
    """The store in which ranks leave their addresses, once all are there."""
    listener = -1
    if rank == 0:
        # Bound by us, because torch would listen on every interface.
        try:
            listener = socket.create_server((address, port)).detach()
        except OSError as error:
            raise RankLost(_port_problem(address, port, error)) from error
    store: Store = dist.TCPStore(  # type: ignore[attr-defined]  # the stubs forget to export it
        address,
        port,
        size,
        rank == 0,
        timedelta(seconds=_MEET_S),
        wait_for_workers=False,
        master_listen_fd=None if listener < 0 else listener,
    )
    names = [f"here/{each}" for each in range(size)]
    store.set(names[rank], "")
    store.wait(names, timedelta(seconds=_MEET_S))
    return store


def _port_problem(address: str, port: int, error: OSError) -> str:
    if error.errno == errno.EADDRINUSE:
        return f"port {port} of {address} is already in use: choose another MASTER_PORT"
    return f"cannot listen on port {port} of {address}: {error.strerror}"


def _gloo(store: Store, rank: int, size: int, *, is_local: bool) -> ProcessGroup:
    groups: Any = dist.ProcessGroupGloo  # whose stubs lag behind what it takes
    options = groups._Options()
    options._timeout = timedelta(seconds=_COLLECTIVE_S)
    device = groups.create_device(hostname="localhost") if is_local else None
    options._devices = [device or groups.create_default_device()]
    backend: ProcessGroup = groups(store, rank, size, options)
    return backend


def _nccl(store: Store, rank: int, size: int) -> ProcessGroup:
    groups: Any = dist.ProcessGroupNCCL
    options = groups.Options(is_high_priority_stream=True)
    options._timeout = timedelta(seconds=_COLLECTIVE_S)
    backend: ProcessGroup = groups(store, rank, size, options)
    return backend
