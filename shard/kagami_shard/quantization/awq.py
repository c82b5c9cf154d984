"""AWQ's files (arXiv:2306.00978), the `gemm` packing of AutoAWQ.

A module has `qweight` `[in, out / 8]` int32, `qzeros` `[num_groups, out / 8]`, `scales`
`[num_groups, out]`. The eight outputs of a word do not lie in order, but as CUDA's kernel unpacks
them.
"""

from dataclasses import dataclass

from torch import Tensor

from kagami_shard.quantization.base import Groups
from kagami_shard.quantization.gptq import WORDS, num_groups_of, words_to_bytes
from kagami_shard.quantization.grouped import GroupedWeight, make_grouped, unpack_nibbles
from kagami_shard.weights.checkpoint import Checkpoint

_BITS = 4
# Output i of eight lies in this nibble of the word, counted from the lowest.
_NIBBLE_OF_OUTPUT = (0, 4, 1, 5, 2, 6, 3, 7)


@dataclass(frozen=True, slots=True)
class AWQFormat:
    """4 bits; a `Format`."""

    group_size: int
    """-1: all columns of a row"""

    @property
    def name(self) -> str:
        return "awq"

    def shape(self, checkpoint: Checkpoint, module: str) -> tuple[int, int] | None:
        if f"{module}.qweight" not in checkpoint:
            return None
        num_columns, words = checkpoint.matrix_shape(f"{module}.qweight")
        return words * 32 // _BITS, num_columns

    def check(self, checkpoint: Checkpoint, module: str) -> None:
        num_columns, words = checkpoint.matrix_shape(f"{module}.qweight")
        num_groups = num_groups_of(num_columns, self.group_size)
        checkpoint.check(f"{module}.qweight", (num_columns, words), dtypes=WORDS)
        checkpoint.check(f"{module}.qzeros", (num_groups, words), dtypes=WORDS)
        checkpoint.check(f"{module}.scales", (num_groups, words * 32 // _BITS))

    def read(self, checkpoint: Checkpoint, module: str) -> GroupedWeight:
        codes = _in_order(checkpoint.stored(f"{module}.qweight")).t().contiguous()
        zeros = _in_order(checkpoint.stored(f"{module}.qzeros")).t().contiguous()
        scales = checkpoint.stored(f"{module}.scales").t().contiguous()
        num_columns = codes.shape[1]
        size = num_columns if self.group_size < 0 else self.group_size
        return make_grouped(_BITS, codes, scales, zeros, Groups(num_columns, size))


def _in_order(words: Tensor) -> Tensor:
    """int32 `[rows, out / 8]` to uint8 `[rows, out]`."""
    nibbles = unpack_nibbles(words_to_bytes(words))
    return nibbles.view(words.shape[0], -1, 8)[:, :, _NIBBLE_OF_OUTPUT].flatten(1)
