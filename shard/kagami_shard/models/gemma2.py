"""Gemma 2: four norms a layer, every other layer windowed, soft caps (arXiv:2408.00118)."""

from kagami_proto.errors import UnsupportedModel
from kagami_shard.models.config import Config
from kagami_shard.models.spec import ModelSpec, NormKind, WeightNames, llama_like, windows_of

NAMES = WeightNames(
    after_attention="post_attention_layernorm",
    before_mlp="pre_feedforward_layernorm",
    after_mlp="post_feedforward_layernorm",
)


def spec(config: Config, max_length: int, **differences: object) -> ModelSpec:
    """Gemma 2's; Gemma 3 says with `differences` what it changed."""
    if getattr(config, "use_bidirectional_attention", None):
        raise UnsupportedModel(
            f"model type {config.model_type}: attends in both directions, it generates no text"
        )
    fields: dict[str, object] = {
        "names": NAMES,
        "norm": NormKind.RMS_ONE_CENTERED,
        "activation": config.hidden_activation,
        "qkv_bias": config.attention_bias,
        "output_bias": config.attention_bias,
        "attention_scale": config.query_pre_attn_scalar**-0.5,
        "attention_softcap": config.attn_logit_softcapping,
        "logits_softcap": config.final_logit_softcapping,
        "embedding_multiplier": config.hidden_size**0.5,
    }
    return llama_like(config, max_length, windows=windows_of(config), **(fields | differences))
