"""Matrix products with weights."""

from typing import Protocol

from torch import Tensor
from torch.nn.functional import linear


class Projection(Protocol):
    """`[num_tokens, in]` to `[num_tokens, out]`; packed and quantized weights are others."""

    def __call__(self, hidden: Tensor) -> Tensor: ...


class Linear:
    """`hidden @ weight.T + bias`, the weight `[out, in]` as torch keeps it."""

    __slots__ = ("bias", "weight")

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight = weight
        self.bias = bias

    def __call__(self, hidden: Tensor) -> Tensor:
        return linear(hidden, self.weight, self.bias)
