"""Weights that are no numbers: NaN and infinities, and where in the files they lie.

A pass over all weights would cost a large model a part of its load. What every step multiplies with
is therefore found by a step's output (the warm-up), and only then looked for here. Looked at when
they are loaded are tables of which a step reads single rows, and heads: an infinite row of one may
make a logit of minus infinity, which is a distribution until the next token.
"""

from pathlib import Path

import torch
from torch import Tensor

from kagami_proto.errors import InvalidCheckpoint
from kagami_shard.weights.checkpoint import Checkpoint

_NO_RANGE = (torch.float8_e4m3fn, torch.float8_e5m2)
"""torch cannot compare them"""


def check_finite(checkpoint: Checkpoint, name: str, dtype: torch.dtype) -> None:
    """Raises `InvalidCheckpoint` if `name` has values that are no finite numbers in `dtype`."""
    if (bad := _not_finite(checkpoint.mapped(name), dtype)) is not None:
        raise InvalidCheckpoint(f"{checkpoint.file_of(name)}: {name} {bad}")


def why_not_finite(folder: Path, dtype: torch.dtype) -> str:
    """What makes the output of the model of `folder` no numbers, in one line. Reads all weights."""
    with Checkpoint(folder) as checkpoint:
        for name in checkpoint.names:
            tensor = checkpoint.mapped(name)
            if tensor.is_floating_point() and (bad := _not_finite(tensor, dtype)) is not None:
                return f"{checkpoint.file_of(name)}: {name} {bad}"
    return (
        f"{folder}: all weights are finite, but what the model computes of them in {_name(dtype)} "
        "is not"
    )


def is_finite(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether all values are finite numbers in `dtype` (measured: 40 GB/s on two cores)."""
    if not tensor.numel():
        return True
    values = tensor.float() if tensor.dtype in _NO_RANGE else tensor
    low, high = (float(each) for each in torch.aminmax(values))  # NaN if there is one
    largest = torch.finfo(dtype).max
    return -largest <= low and high <= largest


def _not_finite(tensor: Tensor, dtype: torch.dtype) -> str | None:
    if is_finite(tensor, dtype):
        return None
    values = tensor.float().flatten()
    largest = min(torch.finfo(dtype).max, torch.finfo(torch.float32).max)
    index = int((~(values.abs() <= largest)).nonzero()[0])
    place = [int(each) for each in torch.unravel_index(torch.tensor(index), tensor.shape)]
    return f"is {float(values[index])} at {place}, which is no finite {_name(dtype)}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
