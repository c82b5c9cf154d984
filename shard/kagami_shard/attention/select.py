"""Which attention backend serves."""

from kagami_shard.attention.base import Attention
from kagami_shard.attention.sdpa import SdpaAttention


def select_attention() -> Attention:
    """The fastest backend there is; today the torch one, on every device."""
    return SdpaAttention()
