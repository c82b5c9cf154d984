"""Which attention backend serves a device."""

import torch

from kagami_shard.attention.base import Attention
from kagami_shard.attention.sdpa import SdpaAttention


def select_attention(device: torch.device) -> Attention:
    """The fastest backend that runs on `device`; today the torch one, everywhere."""
    del device
    return SdpaAttention()
