"""Phi-3, 3.5 and 4: qkv and gate-up lie fused in the checkpoint (arXiv:2404.14219)."""

from kagami_shard.models.config import Config
from kagami_shard.models.spec import ModelSpec, WeightNames, llama_like, windows_of


def spec(config: Config, max_length: int) -> ModelSpec:
    return llama_like(
        config,
        max_length,
        windows=windows_of(config),
        names=WeightNames(qkv=("self_attn.qkv_proj",), up=("mlp.gate_up_proj",)),
    )
