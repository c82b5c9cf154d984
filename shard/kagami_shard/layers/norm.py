"""Normalisations. They read and compute float32 and round once, to the weights' dtype."""

from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import layer_norm

from kagami_shard.distributed import TensorParallel


class Norm(Protocol):
    """Normalises the last dimension."""

    def __call__(self, hidden: Tensor) -> Tensor: ...


class RMSNorm:
    """`x / rms(x) * (center + weight)` (arXiv:1910.07467); Gemma's checkpoints center at one."""

    __slots__ = ("_dtype", "_eps", "weight")

    def __init__(self, weight: Tensor, eps: float, *, center: float = 0.0) -> None:
        self.weight = weight.float() + center
        self._eps = eps
        self._dtype = weight.dtype

    def __call__(self, hidden: Tensor) -> Tensor:
        exact = hidden.float()
        scale = torch.rsqrt(exact.square().mean(-1, keepdim=True) + self._eps)
        return (exact * scale * self.weight).to(self._dtype)


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


class LayerNorm:
    """Mean and variance, with weight and bias (arXiv:1607.06450)."""

    __slots__ = ("_bias", "_dtype", "_eps", "weight")

    def __init__(self, weight: Tensor, bias: Tensor, eps: float) -> None:
        self.weight = weight.float()
        self._bias = bias.float()
        self._eps = eps
        self._dtype = weight.dtype

    def __call__(self, hidden: Tensor) -> Tensor:
        exact = hidden.float()
        normed = layer_norm(exact, exact.shape[-1:], self.weight, self._bias, self._eps)
        return normed.to(self._dtype)


class Rounding:
    """In a norm's place before a matmul: the stream, rounded to `dtype`."""

    __slots__ = ("_dtype",)

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype

    def __call__(self, hidden: Tensor) -> Tensor:
        return hidden.to(self._dtype)


def no_norm(hidden: Tensor) -> Tensor:
    """In a norm's place where there is none."""
    return hidden
