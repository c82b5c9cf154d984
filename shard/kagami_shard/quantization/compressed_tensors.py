"""compressed-tensors' files, as llm-compressor writes them: w4a16, w8a16, w8a8 and fp8.

What a module is follows from its tensors. `weight_packed` int32: codes of 4 or 8 bits along the
columns, offset by half their range, beside `weight_shape`, `weight_scale` `[out, num_groups]`,
with asymmetric ones `weight_zero_point` (packed along the outputs) and with reordered activations
`weight_g_idx`. `weight` int8 or float8_e4m3fn: beside `weight_scale`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kagami_proto.errors import InvalidCheckpoint, UnsupportedModel
from kagami_shard.quantization.base import Weight
from kagami_shard.quantization.fp8 import FP8
from kagami_shard.quantization.fp8_checkpoint import read_fp8
from kagami_shard.quantization.gptq import regular_groups, words_to_bytes
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
            out, num_columns = checkpoint.stored(f"{module}.weight_shape").tolist()
            return out, num_columns
        if f"{module}.weight_scale" not in checkpoint:
            return None
        out, num_columns = checkpoint.shape(f"{module}.weight")
        return out, num_columns

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


def _read_packed(checkpoint: Checkpoint, module: str) -> GroupedWeight:
    out, num_columns = checkpoint.stored(f"{module}.weight_shape").tolist()
    words = checkpoint.stored(f"{module}.weight_packed")
    fitting = [bits for bits in _BITS if -(-num_columns * bits // 32) == words.shape[1]]
    if words.dtype != torch.int32 or not fitting:
        raise UnsupportedModel(
            f"{module}.weight_packed is {words.dtype} {tuple(words.shape)} for a matrix "
            f"({out}, {num_columns}): only int32 words of 4 or 8 bits are read"
        )
    bits = fitting[0]
    packed = words_to_bytes(words)[:, : -(-num_columns * bits // 8)].contiguous()
    scales = _by_row(checkpoint.stored(f"{module}.weight_scale"), out)
    zeros = torch.full_like(scales, 1 << (bits - 1), dtype=torch.float16)
    if (name := f"{module}.weight_zero_point") in checkpoint:
        zeros = _zeros(checkpoint.stored(name), bits, out)
    name = f"{module}.weight_g_idx"
    of_column = checkpoint.stored(name) if name in checkpoint else None
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
