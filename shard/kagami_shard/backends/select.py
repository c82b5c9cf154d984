"""Which attention backend serves."""

from kagami_shard.backends.torch.sdpa import SdpaAttention
from kagami_shard.layers.attention import Attention


def select_attention() -> Attention:
    """The fastest backend there is; today the torch one, on every device."""
    return SdpaAttention()
