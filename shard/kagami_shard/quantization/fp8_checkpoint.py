"""Checkpoints with e4m3 weights: `quant_method` fp8 (also DeepSeek's blocks) and fbgemm_fp8.

A module has `weight` in float8_e4m3fn and `weight_scale`, or `weight_scale_inv`, which is a factor
too in spite of its name: one, one a row, or one a block.
"""

from dataclasses import dataclass

from kagami_proto.errors import InvalidCheckpoint
from kagami_shard.quantization.fp8 import FP8, Fp8Weight, check_scales, fp8_weight
from kagami_shard.weights.checkpoint import Checkpoint

_SCALES = ("weight_scale_inv", "weight_scale")


@dataclass(frozen=True, slots=True)
class Fp8Format:
    """A `Format`."""

    block: tuple[int, int] | None
    """Rows and columns that share a scale; None: a row, or the whole matrix"""

    @property
    def name(self) -> str:
        return "fp8"

    def shape(self, checkpoint: Checkpoint, module: str) -> tuple[int, int] | None:
        name = f"{module}.weight"
        if name not in checkpoint or checkpoint.stored_dtype(name) != FP8:
            return None
        return checkpoint.matrix_shape(name)

    def check(self, checkpoint: Checkpoint, module: str) -> None:
        check_fp8(checkpoint, module, self.block)

    def read(self, checkpoint: Checkpoint, module: str) -> Fp8Weight:
        return read_fp8(checkpoint, module, self.block)


def read_fp8(checkpoint: Checkpoint, module: str, block: tuple[int, int] | None) -> Fp8Weight:
    """The e4m3 weight of `module` with the scales beside it; raises `InvalidCheckpoint`."""
    name = _scales_of(checkpoint, module)
    scales = checkpoint.stored(name)
    try:
        return fp8_weight(checkpoint.stored(f"{module}.weight"), scales, block)
    except InvalidCheckpoint as error:
        raise InvalidCheckpoint(f"{name}: {error}") from error


def check_fp8(checkpoint: Checkpoint, module: str, block: tuple[int, int] | None) -> None:
    """Whether the scales are floats, and as many as `fp8_weight` needs, by their headers."""
    name = _scales_of(checkpoint, module)
    shape = checkpoint.shape(name)
    checkpoint.check(name, shape)
    try:
        check_scales(shape, checkpoint.matrix_shape(f"{module}.weight"), block)
    except InvalidCheckpoint as error:
        raise InvalidCheckpoint(f"{name} of {checkpoint.folder}: {error}") from error


def _scales_of(checkpoint: Checkpoint, module: str) -> str:
    names = [f"{module}.{suffix}" for suffix in _SCALES]
    return next((name for name in names if name in checkpoint), names[-1])
