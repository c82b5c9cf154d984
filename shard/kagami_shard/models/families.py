"""What each family is to the one decoder: config.json to a `ModelSpec`.

A function starts from `llama_like` and says what differs. A new family is a function and a row.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType

from kagami_proto.errors import UnsupportedModel
from kagami_shard.models.config import Config
from kagami_shard.models.spec import (
    LayerSpec,
    ModelSpec,
    NormKind,
    QKNorm,
    WeightNames,
    llama_like,
    rope_of,
    windows_of,
)

_GEMMA2_NAMES = WeightNames(
    after_attention="post_attention_layernorm",
    before_mlp="pre_feedforward_layernorm",
    after_mlp="post_feedforward_layernorm",
)
# A checkpoint with a vision tower keeps the text model one level down, in either order.
_GEMMA3_PREFIXES = ("model.", "language_model.model.", "model.language_model.")
_GEMMA3_ROPES = ("full_attention", "sliding_attention")


def _llama(config: Config, max_length: int) -> ModelSpec:
    """Llama 1 to 3 and what copies it: SmolLM2, Yi, TinyLlama (arXiv:2307.09288, 2407.21783)."""
    return llama_like(
        config,
        max_length,
        qkv_bias=config.attention_bias,
        output_bias=config.attention_bias,
        mlp_bias=config.mlp_bias,
    )


def _mistral(config: Config, max_length: int) -> ModelSpec:
    """Mistral 7B and its kin: Llama with a window in every layer (arXiv:2310.06825)."""
    return llama_like(config, max_length, windows=windows_of(config))


def _qwen2(config: Config, max_length: int) -> ModelSpec:
    """Qwen2 and 2.5: biases on query, key and value; windows in the upper layers
    (arXiv:2407.10671).
    """
    return llama_like(config, max_length, windows=windows_of(config), qkv_bias=True)


def _qwen3(config: Config, max_length: int) -> ModelSpec:
    """Qwen3: norms on every head of query and key (arXiv:2505.09388)."""
    return llama_like(
        config,
        max_length,
        windows=windows_of(config),
        qk_norm=QKNorm.PER_HEAD,
        qkv_bias=config.attention_bias,
        output_bias=config.attention_bias,
    )


def _phi3(config: Config, max_length: int) -> ModelSpec:
    """Phi-3, 3.5 and 4: qkv and gate-up lie fused in the checkpoint (arXiv:2404.14219)."""
    return llama_like(
        config,
        max_length,
        windows=windows_of(config),
        names=WeightNames(qkv=("self_attn.qkv_proj",), up=("mlp.gate_up_proj",)),
    )


def _starcoder2(config: Config, max_length: int) -> ModelSpec:
    """StarCoder2: LayerNorm, biases everywhere, an mlp without gate (arXiv:2402.19173)."""
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


def _olmo2(config: Config, max_length: int) -> ModelSpec:
    """OLMo 2: norms after attention and mlp, and over whole queries and keys (arXiv:2501.00656)."""
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


def _granite(config: Config, max_length: int) -> ModelSpec:
    """Granite 3: Llama with a factor at every joint (arXiv:2405.04324)."""
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


def _gemma2(config: Config, max_length: int, **differences: object) -> ModelSpec:
    """Gemma 2: four norms a layer, every other layer windowed, soft caps (arXiv:2408.00118).

    Gemma 3 says with `differences` what it changed.
    """
    if getattr(config, "use_bidirectional_attention", None):
        raise UnsupportedModel(
            f"model type {config.model_type}: attends in both directions, it generates no text"
        )
    fields: dict[str, object] = {
        "names": _GEMMA2_NAMES,
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


def _gemma3(config: Config, max_length: int) -> ModelSpec:
    """Gemma 3, text only: one rope for windowed layers, one for the others (arXiv:2503.19786).

    Of `gemma3_text`, or of the text half of `gemma3`.
    """
    text = config.get_text_config()
    return _gemma2(
        text,
        max_length,
        model_type=config.model_type,
        names=replace(_GEMMA2_NAMES, prefixes=_GEMMA3_PREFIXES),
        qk_norm=QKNorm.PER_HEAD,
        # transformers knows the field but never applies it to Gemma 3's scores.
        attention_softcap=None,
        layers=tuple(
            LayerSpec(window, _GEMMA3_ROPES.index(kind))
            for window, kind in zip(windows_of(text), text.layer_types, strict=True)
        ),
        ropes=tuple(rope_of(text, max_length, kind) for kind in _GEMMA3_ROPES),
    )


FAMILIES: Mapping[str, Callable[[Config, int], ModelSpec]] = MappingProxyType(
    {
        "gemma2": _gemma2,
        "gemma3": _gemma3,
        "gemma3_text": _gemma3,
        "granite": _granite,
        "llama": _llama,
        "mistral": _mistral,
        "olmo2": _olmo2,
        "phi3": _phi3,
        "qwen2": _qwen2,
        "qwen3": _qwen3,
        "starcoder2": _starcoder2,
    }
)
"""By `model_type` of config.json; called with the config and the longest sequence to be served, 0
for all that the model can"""
