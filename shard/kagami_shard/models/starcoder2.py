"""StarCoder2: LayerNorm, biases everywhere, an mlp without gate (arXiv:2402.19173)."""

from kagami_shard.models.config import Config
from kagami_shard.models.spec import ModelSpec, NormKind, WeightNames, llama_like, windows_of


def spec(config: Config, max_length: int) -> ModelSpec:
    return llama_like(
        config,
        max_length,
        windows=windows_of(config),
        norm=NormKind.LAYER,
        norm_eps=config.norm_epsilon,
        gated=False,
        qkv_bias=config.use_bias,
        output_bias=config.use_bias,
        mlp_bias=config.use_bias,
        names=WeightNames(up=("mlp.c_fc",), down="mlp.c_proj"),
    )
