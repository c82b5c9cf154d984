"""config.json as the specs read it.

transformers' `AutoConfig` fills in defaults and gives old spellings one form, but it takes 1.6 s
to import: more than all the rest of a small model's start (notes/0012). A file that says in the
present spelling all that its family's spec reads is therefore taken as it is. `AutoConfig` reads
every other one, and every one with code of its own: `auto_config.py`.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Protocol


class Config(Protocol):
    """`PlainConfig`, or transformers' `PreTrainedConfig`."""

    def __getattr__(self, name: str) -> Any: ...


class PlainConfig:
    """A config.json as it is; a field that it lacks is an `AttributeError`."""

    def __init__(self, fields: Mapping[str, Any]) -> None:
        self._fields = MappingProxyType(dict(fields))

    def __getattr__(self, name: str) -> Any:
        try:
            return self._fields[name]
        except KeyError:
            raise AttributeError(name) from None


# What the specs of these families read, and the one type that counts as said plainly.
_OF_LLAMA: Mapping[str, type] = MappingProxyType(
    {
        "hidden_act": str,
        "hidden_size": int,
        "intermediate_size": int,
        "max_position_embeddings": int,
        "num_attention_heads": int,
        "num_hidden_layers": int,
        "num_key_value_heads": int,
        "rms_norm_eps": float,
        "tie_word_embeddings": bool,
        "vocab_size": int,
    }
)
_READ: Mapping[str, Mapping[str, type]] = MappingProxyType(
    {"llama": _OF_LLAMA, "mistral": _OF_LLAMA}
)
# Fields that came later: a file without one, or with null, means this in every version.
_DEFAULTS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {"llama": {"attention_bias": False, "mlp_bias": False}, "mistral": {}}
)
# Of fields that may be there: any other type goes to `AutoConfig`, which refuses it.
_OPTIONAL: Mapping[str, type | tuple[type, ...]] = MappingProxyType(
    {
        "attention_bias": bool,
        "head_dim": (int, type(None)),
        "mlp_bias": bool,
        "sliding_window": (int, type(None)),
    }
)
# These change what the others mean.
_NEVER_PLAIN = ("auto_map", "is_encoder_decoder", "layer_types", "compression_config")


def plain_config(fields: Mapping[str, Any]) -> PlainConfig | None:
    """The content of a config.json as it is, if that is all its family's spec needs."""
    model_type = fields.get("model_type")
    if (needed := _READ.get(model_type) if isinstance(model_type, str) else None) is None:
        return None
    rope = _plain_rope(fields)
    if (
        rope is None
        or any(type(fields.get(name)) is not kind for name, kind in needed.items())
        or any(
            not isinstance(fields[name], kind) for name, kind in _OPTIONAL.items() if name in fields
        )
        or any(fields.get(name) for name in _NEVER_PLAIN)
        or ("sliding_window" not in fields and model_type == "mistral")
    ):
        return None
    return PlainConfig(
        {**_DEFAULTS[str(model_type)], **fields, "is_encoder_decoder": False, **rope}
    )


def _plain_rope(fields: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """`rope_parameters` as every version of transformers would have it, or None."""
    theta, scaling = fields.get("rope_theta"), fields.get("rope_scaling")
    parameters = fields.get("rope_parameters")
    if parameters is None and scaling is None and isinstance(theta, int | float):
        return {"rope_parameters": {"rope_theta": theta, "rope_type": "default"}}
    if not isinstance(parameters, dict) or theta is not None or scaling is not None:
        return None
    if parameters.keys() != {"rope_theta", "rope_type"} or parameters["rope_type"] != "default":
        return None
    return {"rope_parameters": parameters}
