"""Qwen3: norms on every head of query and key (arXiv:2505.09388)."""

from kagami_shard.models.config import Config
from kagami_shard.models.spec import ModelSpec, QKNorm, llama_like, windows_of


def spec(config: Config, max_length: int) -> ModelSpec:
    return llama_like(
        config,
        max_length,
        windows=windows_of(config),
        qk_norm=QKNorm.PER_HEAD,
        qkv_bias=config.attention_bias,
        output_bias=config.attention_bias,
    )
