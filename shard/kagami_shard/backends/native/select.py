"""Whether the library computes, and if not, why: one line in the log.

The library is compiled for the machine that it runs on. Until it is built torch serves; then the
native backend takes over between two steps.
"""

import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from kagami_shard.backends.base import Backend
from kagami_shard.backends.native.build import BuildFailed, build, find_library
from kagami_shard.backends.native.check import agrees_with_torch
from kagami_shard.backends.native.cpu import cpu_is_supported
from kagami_shard.backends.native.library import Library
from kagami_shard.backends.native.model import RecordedDecoder
from kagami_shard.backends.native.recorder import NotRecordable
from kagami_shard.backends.native.runner import NativeBackend
from kagami_shard.backends.native.runtime import Runtime
from kagami_shard.backends.torch.runner import TorchBackend
from kagami_shard.forward.kv_cache import KVCache
from kagami_shard.models.base import Model
from kagami_shard.models.decoder import Decoder

logger = logging.getLogger(__name__)


class Unavailable(Exception):
    """Why torch computes; one line."""


class LateBuild:
    """Compiles the library in a thread of its own, while torch serves."""

    def __init__(self, cache: Path) -> None:
        self._cache = cache

    def start(self, on_built: Callable[[], None]) -> None:
        """Build; `on_built` is called on the builder's thread, and not if the build fails."""
        # A daemon: the compiler's end is not waited for when the shard stops.
        threading.Thread(target=self.build, args=(on_built,), name="build", daemon=True).start()

    def build(self, on_built: Callable[[], None]) -> None:
        """What `start` does, on the caller's thread."""
        try:
            build(self._cache)
        except BuildFailed as error:
            _log(Unavailable(f"the library cannot be built: {error}"))
            return
        on_built()


@dataclass(frozen=True, slots=True)
class Native:
    """Where the library is kept, and with how many threads it computes."""

    cache: Path
    num_threads: int

    def will_pack(self, *, dtype: torch.dtype, device: torch.device) -> bool:
        """Whether a decoder's weights are packed as soon as it is loaded, if nothing is wrong."""
        try:
            _check_place(dtype, device)
            return self._is_built()
        except Unavailable:
            return False

    def choose(self, backend: TorchBackend) -> tuple[Backend, LateBuild | None]:
        """The native backend for the model of `backend`, if it can compute it.

        Otherwise `backend` itself, and the build to start if one is missing. Called on the
        engine's thread, for the library is compared with torch.
        """
        try:
            _check(backend)
            if self._is_built():
                return self.take_over(backend, None), None
        except Unavailable as error:
            _log(error)
            return backend, None
        return backend, LateBuild(self.cache)

    def take_over(self, backend: TorchBackend, cache: KVCache | None) -> Backend:
        """A `Successor`: takes the weights of `backend`, and brings `cache` into its own order."""
        try:
            return self._native(backend, cache)
        except Unavailable as error:
            _log(error)
            return backend

    def _is_built(self) -> bool:
        try:
            return find_library(self.cache) is not None
        except BuildFailed as error:
            raise Unavailable(f"the library cannot be built: {error}") from error

    def _native(self, backend: TorchBackend, cache: KVCache | None) -> NativeBackend:
        started = time.monotonic()
        decoder = _check(backend)
        try:
            runtime = Runtime(_load(build(self.cache)), self.num_threads)
            if not agrees_with_torch(runtime):
                raise Unavailable("the library disagrees with torch")
            model = RecordedDecoder(decoder, runtime)
        except (BuildFailed, OSError) as error:
            raise Unavailable(f"the library cannot be loaded: {error}") from error
        except NotRecordable as error:
            raise Unavailable(f"model type {decoder.model_type}: {error}") from error
        if cache is not None:
            runtime.arrange(cache)
        logger.info(
            "CPU kernels: native",
            extra={
                "threads": self.num_threads,
                "amx": runtime.use_amx,
                "seconds": round(time.monotonic() - started, 2),
            },
        )
        return NativeBackend(model, runtime, memory_fraction=backend.memory_fraction)


def _check(backend: TorchBackend) -> Decoder:
    """The model as what can be recorded."""
    _check_place(backend.dtype, backend.device)
    model: Model = backend.model
    if not isinstance(model, Decoder):
        raise Unavailable(f"model type {model.model_type} runs in transformers' own code")
    return model


def _check_place(dtype: torch.dtype, device: torch.device) -> None:
    if device.type != "cpu":
        raise Unavailable(f"the device is {device.type}")
    if dtype is not torch.bfloat16:
        raise Unavailable(f"the dtype is {str(dtype).removeprefix('torch.')}, not bfloat16")
    if not cpu_is_supported():
        raise Unavailable("the processor has no AVX-512 with bf16 and VNNI")


def _load(path: Path) -> Library:
    try:
        return Library(path)
    except OSError:
        with suppress(OSError):
            path.unlink()  # it is damaged: the next start builds another
        raise


def _log(reason: Unavailable) -> None:
    logger.info("CPU kernels: torch, because %s", reason)
