"""Matrix products with weights."""

from typing import Protocol

import torch
from torch import Tensor
from torch.nn.functional import linear

from kagami_shard.machine.distributed import TensorParallel
from kagami_shard.quantization.base import DenseWeight, Weight, bytes_of
from kagami_shard.weights.stored import Matrix, StoredRows, tensor_of


class Projection(Protocol):
    """`[num_tokens, in]` to `[num_tokens, out]`; packed and quantized weights are others."""

    def __call__(self, hidden: Tensor) -> Tensor: ...

    @property
    def weight_bytes(self) -> int:
        """What a step reads of it."""


class Linear:
    """`hidden @ weight.T + bias`, the weight `[out, in]` as torch keeps it."""

    __slots__ = ("bias", "source")

    def __init__(self, weight: Matrix, bias: Tensor | None = None) -> None:
        self.source = weight
        self.bias = bias

    @property
    def weight(self) -> Tensor:
        return tensor_of(self.source)

    def __call__(self, hidden: Tensor) -> Tensor:
        return linear(hidden, self.weight, self.bias)

    @property
    def out_features(self) -> int:
        return self.source.shape[0]

    @property
    def matrix(self) -> Weight | StoredRows:
        """The weight in the form that it is kept in."""
        source = self.source
        return source if isinstance(source, StoredRows) else DenseWeight(source)

    @property
    def weight_bytes(self) -> int:
        return self.matrix.num_bytes + bytes_of(self.bias)

    def give_away(self) -> None:
        """Somebody else has the weight from now on."""
        self.source = torch.empty(0)


class QuantizedLinear:
    """The same with a weight in another form."""

    __slots__ = ("bias", "matrix")

    def __init__(self, weight: Weight, bias: Tensor | None = None) -> None:
        self.matrix = weight
        self.bias = bias

    def __call__(self, hidden: Tensor) -> Tensor:
        output = self.matrix.linear(hidden)
        return output if self.bias is None else output + self.bias

    @property
    def out_features(self) -> int:
        return self.matrix.shape[0]

    @property
    def weight_bytes(self) -> int:
        return self.matrix.num_bytes + bytes_of(self.bias)

    def give_away(self) -> None:
        """Somebody else has the weight from now on."""
        self.matrix = DenseWeight(torch.empty(0, 0))


class RowLinear:
    """A linear cut by its input: the ranks' partial products are summed, the bias added once.

    The sum is float32, as the stream is that it goes into: in bfloat16 each addend of the stream
    would be rounded once more than on one rank (notes/0005).
    """

    __slots__ = ("_parallel", "bias", "project")

    def __init__(self, project: Projection, bias: Tensor | None, parallel: TensorParallel) -> None:
        """`project` is this rank's part, without bias."""
        self.project = project
        self.bias = bias
        self._parallel = parallel

    def __call__(self, hidden: Tensor) -> Tensor:
        output = self._parallel.all_reduce(self.project(hidden).float())
        return output if self.bias is None else output + self.bias

    @property
    def weight_bytes(self) -> int:
        return self.project.weight_bytes + bytes_of(self.bias)


def projection(weight: Weight | StoredRows, bias: Tensor | None = None) -> Projection:
    """The matmul with `weight`, whatever its form."""
    if isinstance(weight, DenseWeight):
        return Linear(weight.values, bias)
    if isinstance(weight, StoredRows):
        return Linear(weight, bias)
    return QuantizedLinear(weight, bias)
