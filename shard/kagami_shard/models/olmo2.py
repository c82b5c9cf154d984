"""OLMo 2: norms after attention and mlp, and over whole queries and keys (arXiv:2501.00656)."""

from kagami_shard.models.config import Config
from kagami_shard.models.spec import ModelSpec, QKNorm, WeightNames, llama_like


def spec(config: Config, max_length: int) -> ModelSpec:
    return llama_like(
        config,
        max_length,
        qk_norm=QKNorm.FULL,
        qkv_bias=config.attention_bias,
        output_bias=config.attention_bias,
        names=WeightNames(
            before_attention=None,
            after_attention="post_attention_layernorm",
            before_mlp=None,
            after_mlp="post_feedforward_layernorm",
        ),
    )
