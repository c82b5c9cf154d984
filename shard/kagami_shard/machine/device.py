"""Which device a rank computes on, and how small host values get there."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


def to_device(values: Sequence[object], *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """`values` as a tensor on `device`.

    `torch.tensor(values, device="cuda")` waits for everything the device still has to do; a copy
    out of pinned memory takes its turn in the stream.
    """
    return send(torch.tensor(values, dtype=dtype), device)


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host's on `device`, where its copy takes its turn in the stream."""
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def is_read_at_once(device: torch.device) -> bool:
    """Whether the host reads a result there without waiting for all that the device has to do."""
    return device.type == "cpu"


class ProductShape(NamedTuple):
    """What torch's product of int8 matrices wants on a device."""

    min_rows: int
    multiple: int
    """Of which widths are"""


def int8_product_shape(device: torch.device) -> ProductShape:
    """On CUDA more than 16 rows, and widths by 8."""
    return ProductShape(17, 8) if device.type == "cuda" else ProductShape(0, 1)


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
