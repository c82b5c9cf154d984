"""compressed-tensors' files, as llm-compressor writes them: w4a16, w8a16, w8a8 and fp8.

What a module is follows from its tensors. `weight_packed` int32: codes of 4 or 8 bits along the
columns, offset by half their range, beside `weight_shape`, `weight_scale` `[out, num_groups]`,
with asymmetric ones `weight_zero_point` (packed along the outputs) and with reordered activations
`weight_g_idx`. `weight` int8 or float8_e4m3fn: beside `weight_scale`.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kagami_proto.errors import InvalidCheckpoint, UnsupportedModel
from kagami_shard.quantization.base import Weight
from kagami_shard.quantization.fp8 import FP8
from kagami_shard.quantization.fp8_checkpoint import check_fp8, read_fp8
from kagami_shard.quantization.gptq import (
    INDICES,
    WORDS,
    group_of_column,
    regular_groups,
    words_to_bytes,
)
from kagami_shard.quantization.grouped import GroupedWeight, make_grouped, unpack_nibbles
from kagami_shard.quantization.int8 import Int8Weight
from kagami_shard.weights.checkpoint import Checkpoint

_BITS = (4, 8)


@dataclass(frozen=True, slots=True)
class CompressedTensorsFormat:
    """A `Format`."""

    int8_activations: bool
    """int8 weights with one scale a row are multiplied with activations in 8 bits"""
    block: tuple[int, int] | None
    """Of float weights: rows and columns that share a scale"""

    @property
    def name(self) -> str:
        return "compressed-tensors"

    def shape(self, checkpoint: Checkpoint, module: str) -> tuple[int, int] | None:
        if f"{module}.weight_packed" in checkpoint:
            return _stored_shape(checkpoint, module)
        if f"{module}.weight_scale" not in checkpoint:
            return None
        return checkpoint.matrix_shape(f"{module}.weight")

    def check(self, checkpoint: Checkpoint, module: str) -> None:
        if f"{module}.weight_packed" in checkpoint:
            _check_packed(checkpoint, module)
            return
        name = f"{module}.weight"
        shape = checkpoint.matrix_shape(name)
        checkpoint.check(name, shape, dtypes=(FP8, torch.int8))
        if checkpoint.stored_dtype(name) == torch.int8:
            _check_int8(checkpoint, module, shape)
        else:
            check_fp8(checkpoint, module, self.block)

    def read(self, checkpoint: Checkpoint, module: str) -> Weight:
        if f"{module}.weight_packed" in checkpoint:
            return _read_packed(checkpoint, module)
        name = f"{module}.weight"
        match checkpoint.stored_dtype(name):
            case torch.float8_e4m3fn:
                return read_fp8(checkpoint, module, self.block)
            case torch.int8:
                return self._read_int8(checkpoint, module)
            case dtype:
                raise UnsupportedModel(f"{name} is {dtype} with scales: only int8 and {FP8} are")

    def _read_int8(self, checkpoint: Checkpoint, module: str) -> Weight:
        values = checkpoint.stored(f"{module}.weight")
        scales = _by_row(checkpoint.stored(f"{module}.weight_scale"), values.shape[0])
        zero_name = f"{module}.weight_zero_point"
        is_symmetric = zero_name not in checkpoint
        if self.int8_activations and is_symmetric and scales.shape[1] == 1:
            return Int8Weight(values, scales[:, 0].float().contiguous())
        codes = (values.to(torch.int16) + 128).to(torch.uint8)
        zeros = torch.full_like(scales, 128, dtype=torch.float16)
        if not is_symmetric:
            zeros += _by_row(checkpoint.stored(zero_name), values.shape[0])
        size = -(-values.shape[1] // scales.shape[1])
        groups = regular_groups(values.shape[1], size, None)
        return make_grouped(8, codes, scales, zeros, groups)


def _stored_shape(checkpoint: Checkpoint, module: str) -> tuple[int, int]:
    """What `weight_shape` says the packed matrix is."""
    name = f"{module}.weight_shape"
    checkpoint.check(name, (2,), dtypes=INDICES)
    out, num_columns = checkpoint.stored(name).tolist()
    return out, num_columns


def _bits_of(checkpoint: Checkpoint, module: str) -> int:
    """Of the codes in `weight_packed`; raises `UnsupportedModel`."""
    name = f"{module}.weight_packed"
    out, num_columns = _stored_shape(checkpoint, module)
    shape, dtype = checkpoint.shape(name), checkpoint.stored_dtype(name)
    fitting = [bits for bits in _BITS if (out, -(-num_columns * bits // 32)) == shape]
    if dtype != torch.int32 or not fitting:
        raise UnsupportedModel(
            f"{name} is {dtype} {shape} for a matrix "
            f"({out}, {num_columns}): only int32 words of 4 or 8 bits are read"
        )
    return fitting[0]


def _check_packed(checkpoint: Checkpoint, module: str) -> None:
    out, num_columns = _stored_shape(checkpoint, module)
    bits = _bits_of(checkpoint, module)
    num_groups = _check_scales(checkpoint, f"{module}.weight_scale", out, num_columns)
    if (name := f"{module}.weight_zero_point") in checkpoint:
        if checkpoint.stored_dtype(name) == torch.int8:
            _check_zeros(checkpoint, name, out, num_groups)
        else:
            checkpoint.check(name, (-(-out * bits // 32), num_groups), dtypes=WORDS)
    if (name := f"{module}.weight_g_idx") in checkpoint:
        checkpoint.check(name, (num_columns,), dtypes=INDICES)


def _check_int8(checkpoint: Checkpoint, module: str, shape: tuple[int, int]) -> None:
    num_groups = _check_scales(checkpoint, f"{module}.weight_scale", *shape)
    if (name := f"{module}.weight_zero_point") in checkpoint:
        _check_zeros(checkpoint, name, shape[0], num_groups)


def _check_scales(checkpoint: Checkpoint, name: str, out: int, num_columns: int) -> int:
    """The number of groups: any that divides the columns into equal ones, but for the last."""
    shape = checkpoint.shape(name)
    num_groups = shape[1] if len(shape) == 2 else 1
    if math.prod(shape) == 1:
        checkpoint.check(name, shape)
    else:
        checkpoint.check(name, (out, num_groups)[: max(1, len(shape))])
    size = -(-num_columns // max(1, num_groups))
    if -(-num_columns // size) != num_groups:
        raise InvalidCheckpoint(
            f"{name} of {checkpoint.folder} has {num_groups} groups for {num_columns} columns"
        )
    return num_groups


def _check_zeros(checkpoint: Checkpoint, name: str, out: int, num_groups: int) -> None:
    """Whether int8 zeros, not packed, are those of as many scales."""
    shape = checkpoint.shape(name)
    if math.prod(shape) != 1:
        shape = (out, num_groups)[: max(1, len(shape))]
    checkpoint.check(name, shape, dtypes=(torch.int8,))


def _read_packed(checkpoint: Checkpoint, module: str) -> GroupedWeight:
    out, num_columns = _stored_shape(checkpoint, module)
    words = checkpoint.stored(f"{module}.weight_packed")
    bits = _bits_of(checkpoint, module)
    packed = words_to_bytes(words)[:, : -(-num_columns * bits // 8)].contiguous()
    scales = _by_row(checkpoint.stored(f"{module}.weight_scale"), out)
    zeros = torch.full_like(scales, 1 << (bits - 1), dtype=torch.float16)
    if (name := f"{module}.weight_zero_point") in checkpoint:
        zeros = _zeros(checkpoint.stored(name), bits, out)
    name = f"{module}.weight_g_idx"
    of_column = group_of_column(checkpoint, name, scales.shape[1])
    size = -(-num_columns // scales.shape[1])
    groups = regular_groups(num_columns, size, of_column)
    return GroupedWeight(bits, packed, scales, zeros, groups)


def _zeros(stored: Tensor, bits: int, out: int) -> Tensor:
    """`[out, num_groups]` of the codes' range: packed along the outputs, or (older) int8."""
    if stored.dtype == torch.int8:
        return _by_row(stored, out).to(torch.float16) + (1 << (bits - 1))
    codes = words_to_bytes(stored.t())
    codes = unpack_nibbles(codes) if bits == 4 else codes
    return codes[:, :out].t().to(torch.float16).contiguous()


def _by_row(stored: Tensor, out: int) -> Tensor:
    """`[out, num_groups]`; a single value stands for all rows."""
    if stored.numel() == 1:
        return stored.reshape(1, 1).expand(out, 1).contiguous()
    scales = stored.reshape(-1, 1) if stored.ndim == 1 else stored
    if scales.shape[0] != out:
        raise InvalidCheckpoint(
            f"scales of shape {tuple(stored.shape)} do not fit a weight of {out} rows"
        )
    return scales
