"""What a family is to the one decoder: a `ModelSpec`, made from config.json.

Values are those that transformers' `AutoConfig` reads (`config.py`): it fills in defaults and gives
old spellings (`rope_scaling`, `sliding_window_pattern`, `max_window_layers`) one form. Every family
(`families.py`) starts from `llama_like` and says what differs.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from types import MappingProxyType

from kagami_proto.errors import UnsupportedModel
from kagami_shard.layers.rotary import KINDS, RopeSpec
from kagami_shard.models.config import Config


class NormKind(Enum):
    """The formula of a model's norms."""

    RMS = auto()
    RMS_ONE_CENTERED = auto()
    LAYER = auto()


class QKNorm(Enum):
    """Norms on queries and keys before they are rotated."""

    NONE = auto()
    PER_HEAD = auto()
    FULL = auto()
    """Over the whole projection, all heads together"""


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """What may differ from layer to layer."""

    window: int | None = None
    """A token sees itself and the `window - 1` tokens before it"""
    rope: int = 0
    """Index into `ModelSpec.ropes`"""


@dataclass(frozen=True, slots=True)
class WeightNames:
    """Where a checkpoint keeps what; the defaults are Llama's.

    Names are modules (`.weight` and `.bias` follow), those of a layer relative to `layers.{i}`.
    Several names are laid below one another into one matmul. A norm without a name is not there:
    before attention and mlp is Llama's place, after them OLMo 2's, both Gemma's.
    """

    prefixes: tuple[str, ...] = ("model.",)
    """What comes before all names but the head's: the first under which there is an embedding"""
    embedding: str = "embed_tokens"
    final_norm: str = "norm"
    head: str = "lm_head"
    qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    qk_norm: tuple[str, str] = ("self_attn.q_norm", "self_attn.k_norm")
    output: str = "self_attn.o_proj"
    up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    """The gate first, if there is one"""
    down: str = "mlp.down_proj"
    before_attention: str | None = "input_layernorm"
    after_attention: str | None = None
    before_mlp: str | None = "post_attention_layernorm"
    after_mlp: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """All the decoder knows of a model."""

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    """Columns of what closes an mlp"""
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    layers: tuple[LayerSpec, ...]
    ropes: tuple[RopeSpec, ...]
    names: WeightNames = WeightNames()

    norm: NormKind = NormKind.RMS
    norm_eps: float = 1e-6
    qk_norm: QKNorm = QKNorm.NONE
    activation: str = "silu"
    gated: bool = True
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    tied_head: bool = False

    attention_scale: float
    """Factor on the scores"""
    attention_softcap: float | None = None
    logits_softcap: float | None = None
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    """Factor on what a layer's halves add (Granite)"""
    logits_divisor: float = 1.0

    def __post_init__(self) -> None:
        """Raises `UnsupportedModel` where numbers contradict each other or are none."""
        for name, kind in _NUMBERS.items():
            value = getattr(self, name)
            is_number = isinstance(value, kind) and not isinstance(value, bool)
            if not is_number or not math.isfinite(value):
                raise self._refused(f"{name} is {value!r}, which is no number for it")
        if self.num_heads % self.num_kv_heads:
            raise self._refused(
                f"num_attention_heads {self.num_heads} is no multiple of num_key_value_heads "
                f"{self.num_kv_heads}"
            )
        for rope in self.ropes:
            if rope.rotary_dim % 2 or not 2 <= rope.rotary_dim <= self.head_dim:
                raise self._refused(
                    f"{rope.rotary_dim} dimensions of a head of {self.head_dim} cannot be rotated: "
                    "their number must be even, and not 0"
                )
        for layer in self.layers:
            if layer.window is not None and not _is_window(layer.window):
                raise self._refused(f"sliding_window {layer.window!r} is no number of tokens")

    def _refused(self, why: str) -> UnsupportedModel:
        return UnsupportedModel(f"model type {self.model_type}: config.json: {why}")


def _is_window(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= _LONGEST


_LONGEST = 1 << 30
"""Window, in tokens"""

_NUMBERS: Mapping[str, type | tuple[type, ...]] = MappingProxyType(
    dict.fromkeys(
        (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_heads",
            "num_kv_heads",
            "head_dim",
            "max_positions",
        ),
        int,
    )
    | dict.fromkeys(
        (
            "norm_eps",
            "attention_scale",
            "embedding_multiplier",
            "residual_multiplier",
            "logits_divisor",
        ),
        (int, float),
    )
)


def head_dim_of(config: Config) -> int:
    """`head_dim` where config.json gives it, else hidden size over heads."""
    if given := getattr(config, "head_dim", None):
        return int(given)
    if config.hidden_size < config.num_attention_heads:
        raise UnsupportedModel(
            f"model type {config.model_type}: config.json: hidden_size {config.hidden_size} is "
            f"less than num_attention_heads {config.num_attention_heads}"
        )
    return int(config.hidden_size // config.num_attention_heads)


def rope_of(config: Config, max_length: int, layer_type: str | None = None) -> RopeSpec:
    """The rope of all layers, or of those of `layer_type`."""
    parameters = config.rope_parameters
    if layer_type is not None and layer_type in parameters:
        parameters = parameters[layer_type]
    kind = parameters["rope_type"]
    if kind not in KINDS:
        raise UnsupportedModel(
            f"model type {config.model_type}: rope_type {kind!r} is none of {', '.join(KINDS)}"
        )
    return RopeSpec(
        rotary_dim=int(head_dim_of(config) * (parameters.get("partial_rotary_factor") or 1.0)),
        theta=float(parameters["rope_theta"]),
        max_positions=config.max_position_embeddings,
        max_length=max_length or config.max_position_embeddings,
        kind=kind,
        parameters=parameters,
    )


def windows_of(config: Config) -> Sequence[int | None]:
    """The window of every layer: by `layer_types` where a family has them, else one for all."""
    window = getattr(config, "sliding_window", None)
    layer_types = getattr(config, "layer_types", None)
    if layer_types is None:
        return [window] * config.num_hidden_layers
    return [window if kind == "sliding_attention" else None for kind in layer_types]


def llama_like(
    config: Config,
    max_length: int,
    *,
    windows: Sequence[int | None] | None = None,
    **differences: object,
) -> ModelSpec:
    """Llama's spec, with fields replaced by `differences`.

    Windows only where a family asks for them: a Llama's config.json may name one by descent.
    """
    head_dim = head_dim_of(config)
    windows = windows or [None] * config.num_hidden_layers
    if len(windows) != config.num_hidden_layers:
        raise UnsupportedModel(
            f"model type {config.model_type}: config.json: layer_types has {len(windows)} entries, "
            f"num_hidden_layers is {config.num_hidden_layers}"
        )
    fields: dict[str, object] = {
        "model_type": config.model_type,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_heads": config.num_attention_heads,
        "num_kv_heads": config.num_key_value_heads or config.num_attention_heads,
        "head_dim": head_dim,
        "max_positions": config.max_position_embeddings,
        "layers": tuple(LayerSpec(window) for window in windows),
        "norm_eps": getattr(config, "rms_norm_eps", 1e-6),
        "activation": getattr(config, "hidden_act", "silu"),
        "tied_head": config.tie_word_embeddings,
        "attention_scale": head_dim**-0.5,
    }
    if "ropes" not in differences:
        fields["ropes"] = (rope_of(config, max_length),)
    # Field names are checked by the call, their types by the parity tests of every family.
    return ModelSpec(**(fields | differences))  # type: ignore[arg-type]  # see above
