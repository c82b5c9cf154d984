"""GPTQ's files (arXiv:2210.17323), as AutoGPTQ and GPTQModel write them.

A module has `qweight` `[in * bits / 32, out]` int32, the columns of a word in order from its lowest
bits; `qzeros` `[num_groups, out * bits / 32]`, packed along the outputs; `scales`
`[num_groups, out]`; `g_idx` `[in]`, the group of each column (out of order with `desc_act`). The
first format keeps zeros less one, `gptq_v2` as they are.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kagami_proto.errors import InvalidCheckpoint
from kagami_shard.quantization.base import Groups
from kagami_shard.quantization.grouped import GroupedWeight, unpack_nibbles
from kagami_shard.weights.checkpoint import Checkpoint

WORDS = (torch.int32,)
INDICES = (torch.int32, torch.int64)


@dataclass(frozen=True, slots=True)
class GPTQFormat:
    """4 or 8 bits; a `Format`."""

    bits: int
    group_size: int
    """-1: all columns of a row"""
    zeros_less_one: bool

    @property
    def name(self) -> str:
        return "gptq"

    def shape(self, checkpoint: Checkpoint, module: str) -> tuple[int, int] | None:
        if f"{module}.qweight" not in checkpoint:
            return None
        rows, out = checkpoint.matrix_shape(f"{module}.qweight")
        return out, rows * 32 // self.bits

    def check(self, checkpoint: Checkpoint, module: str) -> None:
        rows, out = checkpoint.matrix_shape(f"{module}.qweight")
        num_columns = rows * 32 // self.bits
        num_groups = num_groups_of(num_columns, self.group_size)
        checkpoint.check(f"{module}.qweight", (rows, out), dtypes=WORDS)
        zeros = (num_groups, -(-out * self.bits // 32))
        checkpoint.check(f"{module}.qzeros", zeros, dtypes=WORDS)
        checkpoint.check(f"{module}.scales", (num_groups, out))
        if (name := f"{module}.g_idx") in checkpoint:
            checkpoint.check(name, (num_columns,), dtypes=INDICES)

    def read(self, checkpoint: Checkpoint, module: str) -> GroupedWeight:
        packed = words_to_bytes(checkpoint.stored(f"{module}.qweight").t())
        scales = checkpoint.stored(f"{module}.scales").t().contiguous()
        zeros = words_to_bytes(checkpoint.stored(f"{module}.qzeros"))
        if self.bits == 4:
            zeros = unpack_nibbles(zeros)
        zeros = zeros.t()[: packed.shape[0]].to(torch.float16)
        if self.zeros_less_one:
            zeros = zeros + 1
        groups = self._groups(checkpoint, module, packed.shape[1] * 8 // self.bits)
        return GroupedWeight(self.bits, packed, scales, zeros.contiguous(), groups)

    def _groups(self, checkpoint: Checkpoint, module: str, num_columns: int) -> Groups:
        size = num_columns if self.group_size < 0 else self.group_size
        name = f"{module}.g_idx"
        of_column = group_of_column(checkpoint, name, num_groups_of(num_columns, size))
        return regular_groups(num_columns, size, of_column)


def num_groups_of(num_columns: int, size: int) -> int:
    """Of `size` columns each, the last may be short; -1: all columns are one."""
    return 1 if size < 0 else -(-num_columns // size)


def group_of_column(checkpoint: Checkpoint, name: str, num_groups: int) -> Tensor | None:
    """The group of each column, if the checkpoint says it. Raises `InvalidCheckpoint`."""
    if name not in checkpoint:
        return None
    of_column = checkpoint.stored(name)
    if of_column.min() < 0 or of_column.max() >= num_groups:
        raise InvalidCheckpoint(
            f"{name} of {checkpoint.folder} names groups {int(of_column.min())} to "
            f"{int(of_column.max())}, there are {num_groups}"
        )
    return of_column


def regular_groups(num_columns: int, size: int, of_column: Tensor | None) -> Groups:
    """`of_column` is stored only if it says more than `size` does."""
    if of_column is not None:
        of_column = of_column.to(torch.int32)
        in_order = torch.arange(num_columns, dtype=torch.int32) // size
        if not torch.equal(of_column, in_order):
            return Groups(num_columns, size, of_column)
    return Groups(num_columns, size)


def words_to_bytes(words: Tensor) -> Tensor:
    """int32 `[rows, n]` to uint8 `[rows, 4 n]`, the lowest byte first."""
    return words.contiguous().view(torch.uint8)
