"""Granite 3: Llama with a factor at every joint (arXiv:2405.04324)."""

from kagami_shard.models.config import Config
from kagami_shard.models.spec import ModelSpec, llama_like


def spec(config: Config, max_length: int) -> ModelSpec:
    return llama_like(
        config,
        max_length,
        qkv_bias=config.attention_bias,
        output_bias=config.attention_bias,
        mlp_bias=config.mlp_bias,
        attention_scale=config.attention_multiplier,
        embedding_multiplier=config.embedding_multiplier,
        residual_multiplier=config.residual_multiplier,
        logits_divisor=config.logits_scaling,
    )
