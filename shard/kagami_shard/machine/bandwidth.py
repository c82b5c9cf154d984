"""What a step of decodes has to read, and how fast this machine can read it.

A decode is bound by memory: every step reads all weights once and the KV cache of its sequences.
The share of the bandwidth that it reaches says how much could still be gained (design §8).
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from kagami_shard.forward.kv_cache import LayerShape, block_bytes
from kagami_shard.layers.embedding import Embedding
from kagami_shard.layers.rotary import RotaryEmbedding
from kagami_shard.machine.memory import fresh_pages, is_out_of_memory

# Well past the caches: a core complex of today's servers has 32 MiB, an H100 50 MiB.
_CPU_BYTES = 192 << 20
_CUDA_BYTES = 512 << 20
# Of reading; filling the buffer takes about as long.
_PROBE_S = 0.08
# Of these tables a step reads single rows. A head tied to an embedding holds the same tensor.
_READ_BY_ROWS = (Embedding, RotaryEmbedding, torch.nn.Embedding)
_NO_PARTS = (Tensor, type, str, ModuleType, FunctionType, MethodType, BuiltinFunctionType)

Probe = Callable[[torch.device], float]


@dataclass(frozen=True, slots=True)
class ReadCost:
    """Bytes a step reads, and bytes a second."""

    weight_bytes: int
    kv_token_bytes: int
    """KV cache of one token over all layers"""
    bandwidth: float
    """0: not measured"""


def read_cost(
    model: object, layers: Sequence[LayerShape], dtype: torch.dtype, bandwidth: float
) -> ReadCost:
    """What reading `model` and its cache costs. Of a mixture of experts all experts count."""
    return ReadCost(weight_bytes(model), block_bytes(layers, 1, dtype), bandwidth)


@runtime_checkable
class Packed(Protocol):
    """A weight outside of torch's memory."""

    @property
    def num_bytes(self) -> int: ...


def weight_bytes(model: object) -> int:
    """Bytes of every weight that a model holds in whatever form, each storage once.

    Found by walking through attributes and collections, so that no kind of layer or of quantized
    weight has to tell; what is no tensor counts if it is `Packed`.
    """
    storages, num_packed = {}, 0
    for weight in _weights(model, set()):
        if isinstance(weight, Tensor):
            storage = weight.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
        else:
            num_packed += weight.num_bytes
    return sum(storages.values()) + num_packed


def _weights(value: object, seen: set[int]) -> Iterator[Tensor | Packed]:
    if id(value) in seen or isinstance(value, _READ_BY_ROWS):
        return
    seen.add(id(value))
    if isinstance(value, Tensor) or (not isinstance(value, type) and isinstance(value, Packed)):
        yield value
    for part in _parts(value):
        yield from _weights(part, seen)


def _parts(value: object) -> Sequence[object]:
    if isinstance(value, list | tuple | set | frozenset):
        return tuple(value)
    if isinstance(value, dict):
        return tuple(value.values())
    if isinstance(value, _NO_PARTS):
        return ()
    parts = list(getattr(value, "__dict__", {}).values())
    for kind in type(value).__mro__:
        names = getattr(kind, "__slots__", ())
        parts += [
            getattr(value, name)
            for name in ((names,) if isinstance(names, str) else names)
            if hasattr(value, name)
        ]
    return parts


def read_bandwidth(device: torch.device) -> float:
    """Bytes a second that `device` reads from its memory: the best of some passes, 0.2 s in all.

    0 where there is no memory for a buffer.
    """
    try:
        return _measured(device)
    except (MemoryError, OSError, RuntimeError) as error:
        if is_out_of_memory(error):
            return 0.0
        raise
    finally:
        if device.type == "cuda":
            # The pool is sized by the peak of the steps that follow.
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(device)


@torch.inference_mode()
def _measured(device: torch.device) -> float:
    buffer = _buffer(device)
    pass_s = _seconds_on_cuda if device.type == "cuda" else _seconds_on_cpu
    deadline = time.perf_counter() + _PROBE_S
    best_s = pass_s(buffer)
    while time.perf_counter() < deadline:
        best_s = min(best_s, pass_s(buffer))
    return buffer.nbytes / best_s


def _buffer(device: torch.device) -> Tensor:
    """Numbers that were written, as pages never written all stand for one page of zeros."""
    if device.type == "cuda":
        num_bytes = min(_CUDA_BYTES, torch.cuda.mem_get_info(device)[0] // 4)
        return torch.ones(num_bytes // 4, dtype=torch.float32, device=device)
    return torch.frombuffer(fresh_pages(_CPU_BYTES), dtype=torch.float32).fill_(1)


def _seconds_on_cpu(buffer: Tensor) -> float:
    """The largest value is found faster than a sum (m: 32.7 against 28.6 GB/s on two cores)."""
    started = time.perf_counter()
    buffer.amax()
    return time.perf_counter() - started


def _seconds_on_cuda(buffer: Tensor) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    buffer.amax()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3
