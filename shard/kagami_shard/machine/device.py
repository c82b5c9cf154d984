"""Small host values to the device without waiting for it."""

from collections.abc import Sequence

import torch
from torch import Tensor


def to_device(values: Sequence[object], *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`values` as a tensor on `device`.

    `torch.tensor(values, device="cuda")` waits for everything the device still has to do; a copy
    out of pinned memory takes its turn in the stream.
    """
    tensor = torch.tensor(values, dtype=dtype)
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)
