"""Whether an engine computes with the library, and if not, why: one line in the log."""

import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

from kagami_shard.backends.native.attention import CpuAttention
from kagami_shard.backends.native.build import BuildFailed, build, find_library
from kagami_shard.backends.native.check import agrees_with_torch
from kagami_shard.backends.native.cpu import cpu_is_supported
from kagami_shard.backends.native.library import Library
from kagami_shard.backends.native.model import RecordedDecoder
from kagami_shard.backends.native.recorder import NotRecordable
from kagami_shard.backends.native.runtime import Runtime
from kagami_shard.engine.engine import Engine
from kagami_shard.models.base import Model
from kagami_shard.models.decoder import Decoder

logger = logging.getLogger(__name__)


class Unavailable(Exception):
    """Why torch computes; one line."""


class LaterSwitch:
    """An engine that computes in torch until the library is built, in a thread of its own."""

    def __init__(self, engine: Engine, decoder: Decoder, cache: Path, num_threads: int) -> None:
        self._engine = engine
        self._decoder = decoder
        self._cache = cache
        self._num_threads = num_threads

    def start(self, call: Callable[[Callable[[], None]], None]) -> None:
        """Build; `call` then runs the switch between two steps, on the engine's thread."""
        # A daemon: the compiler's end is not waited for when the shard stops.
        threading.Thread(target=self._build, args=(call,), name="build", daemon=True).start()

    def _build(self, call: Callable[[Callable[[], None]], None]) -> None:
        try:
            build(self._cache)
        except BuildFailed as error:
            _log(Unavailable(f"the library cannot be built: {error}"))
            return
        call(self._switch)

    def _switch(self) -> None:
        try:
            _switch(self._engine, self._decoder, self._cache, self._num_threads)
        except Unavailable as error:
            _log(error)


def switch_to_native(
    engine: Engine, *, dtype: torch.dtype, device: torch.device, cache: Path, num_threads: int
) -> LaterSwitch | None:
    """Let the library compute from now on, if it can; the switch to start if it is not built.

    On the engine's thread, for the library is compared with torch.
    """
    try:
        decoder = _check(engine.model, dtype, device)
        if _is_built(cache):
            _switch(engine, decoder, cache, num_threads)
            return None
    except Unavailable as error:
        _log(error)
        return None
    return LaterSwitch(engine, decoder, cache, num_threads)


def will_pack(*, dtype: torch.dtype, device: torch.device, cache: Path) -> bool:
    """Whether a decoder's weights will be packed as soon as it is loaded, if nothing is wrong."""
    try:
        _check_place(dtype, device)
        return _is_built(cache)
    except Unavailable:
        return False


def _check(model: Model, dtype: torch.dtype, device: torch.device) -> Decoder:
    """The model as what can be recorded."""
    _check_place(dtype, device)
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


def _is_built(cache: Path) -> bool:
    try:
        return find_library(cache) is not None
    except BuildFailed as error:
        raise Unavailable(f"the library cannot be built: {error}") from error


def _switch(engine: Engine, decoder: Decoder, cache: Path, num_threads: int) -> None:
    started = time.monotonic()
    try:
        runtime = Runtime(_load(build(cache)), num_threads)
        if not agrees_with_torch(runtime):
            raise Unavailable("the library disagrees with torch")
        model = RecordedDecoder(decoder, runtime)
    except (BuildFailed, OSError) as error:
        raise Unavailable(f"the library cannot be loaded: {error}") from error
    except NotRecordable as error:
        raise Unavailable(f"model type {decoder.model_type}: {error}") from error
    if engine.cache is not None:
        runtime.arrange(engine.cache)
    engine.use(model, CpuAttention(), runtime)
    logger.info(
        "CPU kernels: native",
        extra={
            "threads": num_threads,
            "amx": runtime.use_amx,
            "seconds": round(time.monotonic() - started, 2),
        },
    )


def _load(path: Path) -> Library:
    try:
        return Library(path)
    except OSError:
        with suppress(OSError):
            path.unlink()  # it is damaged: the next start builds another
        raise


def _log(reason: Unavailable) -> None:
    logger.info("CPU kernels: torch, because %s", reason)
