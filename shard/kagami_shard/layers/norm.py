"""Normalisations; all compute in float32 and round once or where transformers does."""

from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import layer_norm


class Norm(Protocol):
    """Normalises the last dimension."""

    def __call__(self, hidden: Tensor) -> Tensor: ...


class RMSNorm:
    """`x / rms(x)`, rounded, times the weight (arXiv:1910.07467)."""

    __slots__ = ("_eps", "weight")

    def __init__(self, weight: Tensor, eps: float) -> None:
        self.weight = weight
        self._eps = eps

    def __call__(self, hidden: Tensor) -> Tensor:
        return self.weight * _over_rms(hidden, self._eps).to(hidden.dtype)


class OneCenteredRMSNorm:
    """Gemma's: the checkpoint keeps `weight - 1`, and rounding comes after the product."""

    __slots__ = ("_eps", "weight")

    def __init__(self, weight: Tensor, eps: float) -> None:
        self.weight = 1.0 + weight.float()
        self._eps = eps

    def __call__(self, hidden: Tensor) -> Tensor:
        return (self.weight * _over_rms(hidden, self._eps)).to(hidden.dtype)


class LayerNorm:
    """Mean and variance, with weight and bias (arXiv:1607.06450)."""

    __slots__ = ("_bias", "_eps", "weight")

    def __init__(self, weight: Tensor, bias: Tensor | None, eps: float) -> None:
        self.weight = weight
        self._bias = bias
        self._eps = eps

    def __call__(self, hidden: Tensor) -> Tensor:
        return layer_norm(hidden, hidden.shape[-1:], self.weight, self._bias, self._eps)


def no_norm(hidden: Tensor) -> Tensor:
    """Where a family has no norm."""
    return hidden


def _over_rms(hidden: Tensor, eps: float) -> Tensor:
    exact = hidden.float()
    return exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + eps)
