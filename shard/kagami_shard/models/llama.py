"""Llama 1 to 3 and what copies it (SmolLM2, Yi, TinyLlama): arXiv:2307.09288, arXiv:2407.21783."""

from kagami_shard.models.config import Config
from kagami_shard.models.spec import ModelSpec, llama_like


def spec(config: Config, max_length: int) -> ModelSpec:
    return llama_like(
        config,
        max_length,
        qkv_bias=config.attention_bias,
        output_bias=config.attention_bias,
        mlp_bias=config.mlp_bias,
    )
