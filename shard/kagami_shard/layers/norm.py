"""Normalisations. They read and compute float32 and round once, to the weights' dtype."""

from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from kagami_shard.machine.distributed import TensorParallel


class Norm(Protocol):
    """Normalises the last dimension."""

    def __call__(self, hidden: Tensor) -> Tensor: ...

    @property
    def weight_bytes(self) -> int:
        """What a step reads of it."""


class RMSNorm:
    """`x / rms(x) * (center + weight)` (arXiv:1910.07467); Gemma's checkpoints center at one."""

    __slots__ = ("_dtype", "eps", "weight")

    def __init__(self, weight: Tensor, eps: float, *, center: float = 0.0) -> None:
        self.weight = weight.float() + center
        self.eps = eps
        self._dtype = weight.dtype

    def __call__(self, hidden: Tensor) -> Tensor:
        exact = hidden.float()
        scale = torch.rsqrt(exact.square().mean(-1, keepdim=True) + self.eps)
        return (exact * scale * self.weight).to(self._dtype)

    @property
    def weight_bytes(self) -> int:
        return self.weight.nbytes


class ShardedRMSNorm:
    """An RMS norm over a row that lies on several ranks: they sum their squares."""

    __slots__ = ("_dtype", "_eps", "_parallel", "_width", "weight")

    def __init__(self, weight: Tensor, eps: float, *, width: int, parallel: TensorParallel) -> None:
        """`width` counts the whole row, as often as its parts are held by several ranks."""
        self.weight = weight.float()
        self._eps = eps
        self._dtype = weight.dtype
        self._width = width
        self._parallel = parallel

    def __call__(self, hidden: Tensor) -> Tensor:
        exact = hidden.float()
        squares = self._parallel.all_reduce(exact.square().sum(-1, keepdim=True))
        return (exact * torch.rsqrt(squares / self._width + self._eps) * self.weight).to(
            self._dtype
        )

    @property
    def weight_bytes(self) -> int:
        return self.weight.nbytes


class LayerNorm:
    """Mean and variance, with weight and bias (arXiv:1607.06450)."""

    __slots__ = ("_dtype", "bias", "eps", "weight")

    def __init__(self, weight: Tensor, bias: Tensor, eps: float) -> None:
        self.weight = weight.float()
        self.bias = bias.float()
        self.eps = eps
        self._dtype = weight.dtype

    def __call__(self, hidden: Tensor) -> Tensor:
        exact = hidden.float()
        normed = layer_norm(exact, exact.shape[-1:], self.weight, self.bias, self.eps)
        return normed.to(self._dtype)

    @property
    def weight_bytes(self) -> int:
        return self.weight.nbytes + self.bias.nbytes


class FullNorm:
    """Queries over all their heads together, keys over theirs (OLMo 2, arXiv:2501.00656)."""

    __slots__ = ("_num_heads", "of_key", "of_query")

    def __init__(self, num_heads: int, of_query: Norm, of_key: Norm) -> None:
        self._num_heads = num_heads
        self.of_query = of_query
        self.of_key = of_key

    def __call__(self, hidden: Tensor) -> Tensor:
        """`[num_tokens, num_heads + num_kv_heads, head_dim]`"""
        query, key = hidden.tensor_split((self._num_heads,), dim=1)
        normed = (self.of_query(query.flatten(1)), self.of_key(key.flatten(1)))
        return torch.cat(normed, dim=1).view(hidden.shape)

    @property
    def weight_bytes(self) -> int:
        return self.of_query.weight_bytes + self.of_key.weight_bytes


class Rounding:
    """In a norm's place before a matmul: the stream, rounded to `dtype`."""

    __slots__ = ("_dtype",)

    weight_bytes = 0

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype

    def __call__(self, hidden: Tensor) -> Tensor:
        return hidden.to(self._dtype)


class NoNorm:
    """In a norm's place where there is none: what comes goes on."""

    __slots__ = ()

    weight_bytes = 0

    def __call__(self, hidden: Tensor) -> Tensor:
        return hidden


no_norm = NoNorm()
