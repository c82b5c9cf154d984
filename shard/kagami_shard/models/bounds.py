"""What config.json may say: its numbers are within bounds before anyone uses them.

A size decides how much is allocated and how often a loop turns, so a file must not choose it
freely. The bounds lie far beyond every published model. They hold for the model and for the parts
of it that have a config of their own (`text_config`, …), whoever reads the file next.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from kagami_proto.errors import InvalidCheckpoint
from kagami_shard.weights.json_files import shown


class Bounds(NamedTuple):
    """The smallest and the largest value of a field."""

    low: float
    high: float
    is_whole: bool = True

    @property
    def words(self) -> str:
        kind = "a whole number" if self.is_whole else "a number"
        return f"{kind} from {self.low:g} to {self.high:g}"

    def allow(self, value: object) -> bool:
        """Whether it is such a number; NaN and the infinities lie outside of all bounds."""
        if isinstance(value, bool) or not isinstance(value, int if self.is_whole else int | float):
            return False
        return self.low <= value <= self.high


_LAYERS, _HEADS, _POSITIONS = Bounds(1, 1024), Bounds(1, 4096), Bounds(1, 1 << 30)
_WIDTH, _INNER, _VOCABULARY = Bounds(1, 1 << 17), Bounds(1, 1 << 20), Bounds(1, 1 << 22)
_EXPERTS = Bounds(0, 1 << 14)
_FACTOR = Bounds(-1e9, 1e9, is_whole=False)
_POSITIVE = Bounds(1e-9, 1e15, is_whole=False)
_EPSILON = Bounds(0, 1, is_whole=False)

_FIELDS: Mapping[str, Bounds] = MappingProxyType(
    dict.fromkeys(
        (
            *("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
            *("decoder_layers", "encoder_layers", "num_decoder_layers"),
        ),
        _LAYERS,
    )
    | dict.fromkeys(
        ("num_attention_heads", "num_key_value_heads", "n_head", "n_heads", "num_heads"), _HEADS
    )
    | dict.fromkeys(
        ("head_dim", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), Bounds(1, 1 << 14)
    )
    | dict.fromkeys(("hidden_size", "n_embd", "n_embed", "d_model"), _WIDTH)
    | dict.fromkeys(
        (
            "intermediate_size",
            "moe_intermediate_size",
            "shared_expert_intermediate_size",
            "n_inner",
            "ffn_dim",
            "d_ff",
        ),
        _INNER,
    )
    | {"vocab_size": _VOCABULARY}
    | dict.fromkeys(
        ("num_experts", "num_local_experts", "n_routed_experts", "num_experts_per_tok"), _EXPERTS
    )
    | dict.fromkeys(
        ("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length", "max_seq_len"),
        _POSITIONS,
    )
    | dict.fromkeys(
        ("rms_norm_eps", "norm_epsilon", "layer_norm_epsilon", "layer_norm_eps", "norm_eps"),
        _EPSILON,
    )
    | dict.fromkeys(
        ("attention_multiplier", "embedding_multiplier", "residual_multiplier"), _FACTOR
    )
    | dict.fromkeys(
        (
            "attn_logit_softcapping",
            "final_logit_softcapping",
            "logits_scaling",
            "query_pre_attn_scalar",
            "rope_theta",
            "rope_local_base_freq",
        ),
        _POSITIVE,
    )
    | dict.fromkeys(("partial_rotary_factor", "rotary_pct"), Bounds(0, 1, is_whole=False))
)
_ROPES = ("rope_parameters", "rope_scaling")
_DEEPEST = 4
"""Levels of configs within configs, and of ropes by kind of layer"""


def check_bounds(fields: Mapping[str, Any], file: Path) -> None:
    """Every number in `fields`, the content of `file`, that this table knows; raises
    `InvalidCheckpoint`.
    """
    for path, value, bounds in _numbers(fields, "", _DEEPEST):
        if not bounds.allow(value):
            raise InvalidCheckpoint(f"{file}: {path} must be {bounds.words}, not {shown(value)}")
    for path, config in _configs(fields, "", _DEEPEST):
        for name in _ROPES:
            _check_rope(config.get(name), f"{path}{name}", file, _DEEPEST)


def _numbers(
    fields: Mapping[str, Any], path: str, depth: int
) -> Iterator[tuple[str, object, Bounds]]:
    """Fields that are set, with their bounds; of a list (one for each layer) every entry."""
    for prefix, config in _configs(fields, path, depth):
        for name in config.keys() & _FIELDS.keys():
            value = config[name]
            for each in value if isinstance(value, list) else [value]:
                if each is not None:
                    yield f"{prefix}{name}", each, _FIELDS[name]


def _configs(
    fields: Mapping[str, Any], path: str, depth: int
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    yield path, fields
    for name, value in fields.items():
        if depth and name.endswith("_config") and isinstance(value, dict):
            yield from _configs(value, f"{path}{name}.", depth - 1)


def _check_rope(value: object, path: str, file: Path, depth: int) -> None:
    """Numbers are finite; what they mean is the rope's business."""
    if isinstance(value, dict) and depth:
        for name, each in value.items():
            _check_rope(each, f"{path}.{name}", file, depth - 1)
    elif isinstance(value, list) and depth:
        for each in value:
            _check_rope(each, path, file, depth - 1)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        if not abs(value) <= _POSITIVE.high:  # nor is NaN
            raise InvalidCheckpoint(f"{file}: {path} {shown(value)} is out of bounds")
