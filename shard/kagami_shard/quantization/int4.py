"""4-bit weights made at load: groups of 32 columns, each with a scale and a zero.

Round to nearest between a group's smallest and largest value. Symmetric groups, and ranges shrunk
for the least squared error, were measured and lost (README.md).
"""

import torch
from torch import Tensor

from kagami_shard.quantization.base import Groups
from kagami_shard.quantization.grouped import ZERO_PARTS, GroupedWeight, make_grouped

GROUP_SIZE = 32
_MAX = 15
# Rows quantized at a time: the float32 temporaries stay small beside the weights.
_CHUNK_ROWS = 1024


def quantize_int4(matrix: Tensor, group_size: int = GROUP_SIZE) -> GroupedWeight:
    """The 4-bit weight nearest to `matrix` `[out, in]`; the last group of a row may be short."""
    num_columns = matrix.shape[1]
    parts = [_quantize(rows, group_size) for rows in matrix.split(_CHUNK_ROWS)]
    codes, scales, zeros = (torch.cat(each) for each in zip(*parts, strict=True))
    groups = Groups(num_columns, group_size)
    return make_grouped(4, codes[:, :num_columns], scales, zeros, groups)


def _quantize(matrix: Tensor, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes `[out, in]`, scales and zeros `[out, num_groups]`."""
    out, num_columns = matrix.shape
    num_groups = -(-num_columns // group_size)
    if missing := num_groups * group_size - num_columns:
        matrix = torch.cat((matrix, matrix[:, -1:].expand(-1, missing)), dim=1)
    grouped = matrix.float().view(out, num_groups, group_size)
    low = grouped.amin(dim=2, keepdim=True).clamp_(max=0)
    high = grouped.amax(dim=2, keepdim=True).clamp_(min=0)
    scales, zeros = _range(low, high)
    codes = (grouped / scales + zeros).round_().clamp_(0, _MAX).to(torch.uint8)
    return codes.view(out, -1), scales.view(out, -1).to(torch.float16), zeros.view(out, -1)


def _range(low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and zero that spread 0..15 from `low` to `high`, as they will be stored."""
    scale = ((high - low) / _MAX).to(torch.float16).float()
    scale = torch.where(scale == 0, 1.0, scale)
    zero = (-low / scale * ZERO_PARTS).round_() / ZERO_PARTS
    return scale, zero.clamp_(0, _MAX)
