"""Which device a rank computes on, and how small host values get there."""

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


def find_device(rank: int) -> torch.device:
    """This rank's card, made the current one; the CPU where there is no card."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def device_kind(device: torch.device) -> str:
    """ "cpu" or "cuda", to be told; what follows from it stands in the backend's policy."""
    return device.type
