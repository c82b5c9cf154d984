"""Matrix products with weights."""

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn.functional import linear

from kagami_shard.backends.native.memory import PackedWeight, Packer
from kagami_shard.machine.distributed import TensorParallel
from kagami_shard.quantization.base import DenseWeight, Weight
from kagami_shard.quantization.fp8 import Fp8Weight
from kagami_shard.quantization.grouped import GroupedWeight
from kagami_shard.quantization.int8 import Int8Weight
from kagami_shard.weights.stored import Matrix, StoredRows, parts_of, tensor_of


class Projection(Protocol):
    """`[num_tokens, in]` to `[num_tokens, out]`; packed and quantized weights are others."""

    def __call__(self, hidden: Tensor) -> Tensor: ...


@runtime_checkable
class Packable(Protocol):
    """A projection that the CPU's library can compute, too."""

    @property
    def out_features(self) -> int: ...

    @property
    def turn(self) -> int:
        """0: it reads bf16; else activations in 8 bits, turned so far (quantization/int8.py)."""

    def pack(self, packer: Packer, *, gated: bool = False) -> PackedWeight:
        """The weight as the library reads it; the projection gives its own away.

        With `gated` the two halves of the output are a gate and what it opens.
        """


class Linear:
    """`hidden @ weight.T + bias`, the weight `[out, in]` as torch keeps it."""

    __slots__ = ("bias", "source")

    def __init__(self, weight: Matrix, bias: Tensor | None = None) -> None:
        self.source = weight
        self.bias = bias

    turn = 0

    @property
    def weight(self) -> Tensor:
        return tensor_of(self.source)

    def __call__(self, hidden: Tensor) -> Tensor:
        return linear(hidden, self.weight, self.bias)

    @property
    def out_features(self) -> int:
        return self.source.shape[0]

    def pack(self, packer: Packer, *, gated: bool = False) -> PackedWeight:
        """From where it lies: of a weight in files there is never a copy beside the packed one."""
        source = self.source
        packed = packer.pack(parts_of(source), self.bias, gated=gated)
        if isinstance(source, StoredRows):
            source.give_back()
        self.source = torch.empty(0)
        return packed


class QuantizedLinear:
    """The same with a weight in another form."""

    __slots__ = ("bias", "weight")

    def __init__(self, weight: Weight, bias: Tensor | None = None) -> None:
        self.weight = weight
        self.bias = bias

    def __call__(self, hidden: Tensor) -> Tensor:
        output = self.weight.linear(hidden)
        return output if self.bias is None else output + self.bias

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    @property
    def turn(self) -> int:
        return self.weight.turn if isinstance(self.weight, Int8Weight) else 0

    def pack(self, packer: Packer, *, gated: bool = False) -> PackedWeight:
        """Integers, e4m3 and codes in regular groups as they are, everything else as bf16."""
        packed = self._packed_codes(packer, gated=gated)
        if packed is None:
            packed = packer.pack((self.weight.dequantized(torch.bfloat16),), self.bias, gated=gated)
        self.weight = DenseWeight(torch.empty(0, 0))
        return packed

    def _packed_codes(self, packer: Packer, *, gated: bool) -> PackedWeight | None:
        """None where the library has no such form."""
        weight, bias = self.weight, self.bias
        if isinstance(weight, Int8Weight):
            return packer.pack_int8(weight.values, weight.scales, bias, gated=gated)
        if not isinstance(weight, GroupedWeight | Fp8Weight):
            return None
        if (group := weight.packable_group()) is None:
            return None
        if isinstance(weight, Fp8Weight):
            codes = weight.values.view(torch.uint8)
            return packer.pack_bytes(codes, weight.scales, None, bias, group=group, gated=gated)
        if weight.bits == 4:
            return packer.pack_int4(
                weight.packed,
                weight.scales.half(),
                weight.zeros,
                bias,
                num_columns=weight.shape[1],
                group=group,
                gated=gated,
            )
        scales, zeros = weight.scales.float(), weight.zeros.float()
        return packer.pack_bytes(weight.packed, scales, zeros, bias, group=group, gated=gated)


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


def projection(weight: Weight | StoredRows, bias: Tensor | None = None) -> Projection:
    """The matmul with `weight`, whatever its form."""
    if isinstance(weight, DenseWeight):
        return Linear(weight.values, bias)
    if isinstance(weight, StoredRows):
        return Linear(weight, bias)
    return QuantizedLinear(weight, bias)
