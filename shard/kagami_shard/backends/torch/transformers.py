"""Runs an architecture of transformers' with its own code, over our paged attention.

transformers lets attention be exchanged by name (`ALL_ATTENTION_FUNCTIONS`). Under our name a model
is called with one row of all the step's tokens and their positions, without cache and mask. The
step's `attend` travels as a keyword to the attention call of every layer, which counts to know its
layer. This is right for models that remember nothing but attention's keys and values, and that need
no other mask than a causal one or a window. What can be known is checked before the weights are
read. Then `_verify` compares a few tokens with the model's own attention: a model with a state of
its own, a mask, or without positions is refused, and not served wrong.
"""

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AttentionInterface,
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.utils import logging

from kagami_proto.errors import InvalidCheckpoint, UnsupportedModel
from kagami_shard.backends.torch.sdpa import SdpaAttention
from kagami_shard.forward.batch import ForwardBatch, Queries
from kagami_shard.forward.kv_cache import KVCache, LayerShape
from kagami_shard.forward.output import Output, OutputKind
from kagami_shard.layers.attention import AttentionSpec
from kagami_shard.weights.checkpoint import weight_files
from kagami_shard.weights.finite import is_finite, why_not_finite

Attend = Callable[[Tensor, Tensor, Tensor, AttentionSpec], Tensor]
"""An `AttentionStep`, of which a whole layer's call is all that is used here"""

# Our attention's name in transformers' table. There is no mask function of that name, and so
# transformers makes no masks.
ATTENTION = "kagami_paged"

# Kinds of layers that are attention over keys and values alone.
LAYER_TYPES = frozenset({"full_attention", "sliding_attention", "attention"})

_MAX_TEXT = 300
_MOST_WEIGHTS_IN_A_BYTE = 8

# The largest relative error `_verify` lets pass. A state that is lost moves logits by their own
# size; half precision and experts near a tie by a few percent.
TOLERANCE_FLOAT32 = 1e-2
TOLERANCE_HALF = 0.3


def load_transformers(
    folder: Path,
    config: PreTrainedConfig,
    *,
    dtype: torch.dtype,
    device: torch.device,
    trust_remote_code: bool = False,
) -> "TransformersModel":
    """The model of `folder`; raises `UnsupportedModel` where this path cannot serve it."""
    cls = _class_of(folder, config, trust_remote_code=trust_remote_code)
    cls = _check_class(cls, config)
    weight_files(folder)
    _check_size(folder, cls, config)
    AttentionInterface.register(ATTENTION, _attention)
    with _no_progress_bar(), _loading(folder):
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            attn_implementation=ATTENTION,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
        )
    if missing := sorted(info["missing_keys"]):
        raise InvalidCheckpoint(f"weight {missing[0]} does not exist")
    model = model.to(device).eval().requires_grad_(False)
    if not all(is_finite(weight, dtype) for weight in model.parameters()):
        raise InvalidCheckpoint(why_not_finite(folder, dtype))
    model.config.return_dict = True
    return TransformersModel(model)


class TransformersModel:
    """A `PreTrainedModel` as a `Model`."""

    quantization = ""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._takes_rows = "logits_to_keep" in inspect.signature(model.forward).parameters
        probe = _Probe()
        with torch.inference_mode(), _foreign_errors(model.config):
            logits = self._logits(_batch_of(1, 0, 1, model.device), probe)
            _check_layers(model.config, probe)
            self._layers = tuple(probe.layers)
            self._vocab_size = logits.shape[-1]
            self._verify()

    @property
    def model_type(self) -> str:
        return str(self._model.config.model_type)

    @property
    def layers(self) -> tuple[LayerShape, ...]:
        return self._layers

    @property
    def vocab_size(self) -> int:
        return self._vocab_size

    @property
    def max_positions(self) -> int:
        """transformers' LongRoPE switches by the longest sequence of a step: not past that."""
        config = self._model.config.get_text_config()
        limit = int(getattr(config, "max_position_embeddings", None) or 0)
        rope = getattr(config, "rope_parameters", None) or {}
        if rope.get("rope_type") == "longrope":
            return min(limit, int(rope["original_max_position_embeddings"]))
        return limit

    @property
    def bytes_loaded(self) -> int:
        """Computed as if the files had the model's dtype: transformers does not tell."""
        return sum(weight.nbytes for weight in self._model.parameters())

    @property
    def weight_bytes(self) -> int:
        """Each storage once: a head tied to an embedding, of which a step reads rows, counts."""
        storages: dict[int, int] = {}
        for module in self._model.modules():
            if not isinstance(module, torch.nn.Embedding):
                own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
                storages |= {each.data_ptr(): each.untyped_storage().nbytes() for each in own}
        return sum(storages.values())

    def forward(self, batch: ForwardBatch, attend: Attend, wanted: OutputKind) -> Output:
        """As `runner.Forward` says. The head is computed even where nobody wants logits."""
        wants_vectors = OutputKind.VECTORS in wanted
        rows: dict[str, Any] = {"logits_to_keep": batch.selected_rows} if self._takes_rows else {}
        output = self._model(
            input_ids=batch.input_ids[None],
            position_ids=batch.positions[None],
            use_cache=False,
            output_hidden_states=wants_vectors,
            kagami_layers=_Layers(attend),
            **rows,
        )
        logits: Tensor = output.logits[0]
        if not self._takes_rows:
            logits = logits.index_select(0, batch.selected_rows)
        vectors = None
        if wants_vectors:
            # transformers' last hidden state is the one behind the last norm.
            vectors = output.hidden_states[-1][0].index_select(0, batch.selected_rows).float()
        return Output(logits.float() if OutputKind.LOGITS in wanted else None, vectors)

    def _logits(self, batch: ForwardBatch, attend: Attend) -> Tensor:
        logits = self.forward(batch, attend, OutputKind.LOGITS).logits
        assert logits is not None
        return logits

    def _verify(self) -> None:
        """Six tokens in two chunks must give what the model's own attention gives at once."""
        model, device, dtype = self._model, self._model.device, self._model.dtype
        cache = KVCache(self._layers, 2, 8, dtype=dtype, device=device)
        ours = torch.empty(0)
        for start, stop in ((0, 4), (4, 6)):
            batch = _batch_of(stop, start, self._vocab_size, device)
            ours = self._logits(batch, SdpaAttention().prepare(batch, cache))
        ids = _batch_of(6, 0, self._vocab_size, device).input_ids
        model.set_attn_implementation("eager")
        theirs = model(input_ids=ids[None], use_cache=False).logits[0, -2:].float()
        model.set_attn_implementation(ATTENTION)
        error = float((ours - theirs).norm() / theirs.norm())
        if not error < (TOLERANCE_FLOAT32 if dtype == torch.float32 else TOLERANCE_HALF):
            raise _unsupported(
                model.config,
                "over paged attention it does not compute what it computes alone"
                f" (relative error {error:.2g})",
            )


@dataclass(slots=True, eq=False)
class _Layers:
    """One forward pass: the layer that attends next."""

    attend: Attend
    next: int = 0


@dataclass(slots=True, eq=False)
class _Probe:
    """Attention over a single token, which is its value; notes what the layers ask for."""

    layers: list[LayerShape] = field(default_factory=list)
    specs: list[AttentionSpec] = field(default_factory=list)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, spec: AttentionSpec) -> Tensor:
        self.layers.append(LayerShape(key.shape[1], key.shape[2], value.shape[2]))
        self.specs.append(spec)
        return value.repeat_interleave(query.shape[1] // value.shape[1], dim=1)


def _attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    kagami_layers: _Layers | None = None,
    **others: object,
) -> tuple[Tensor, None]:
    """What transformers calls in every layer; heads come as `[1, num_heads, num_tokens, dim]`."""
    if kagami_layers is None:
        raise _unsupported(_config_of(module), "its layers do not pass our keyword to attention")
    if attention_mask is not None or others.get("position_bias") is not None:
        raise _unsupported(_config_of(module), "it puts a mask or a bias of its own on the scores")
    spec = AttentionSpec(
        layer=kagami_layers.next,
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=sliding_window,
        softcap=softcap,
        sinks=s_aux,
    )
    kagami_layers.next += 1
    query, key, value = (heads[0].transpose(0, 1) for heads in (query, key, value))
    return kagami_layers.attend(query, key, value, spec)[None], None


def _class_of(folder: Path, config: PreTrainedConfig, *, trust_remote_code: bool) -> type | None:
    reference = (getattr(config, "auto_map", None) or {}).get("AutoModelForCausalLM")
    if reference is not None and trust_remote_code:
        remote: type = get_class_from_dynamic_module(reference, folder)
        return remote
    known: type | None = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    return known


def _check_class(cls: type | None, config: PreTrainedConfig) -> type:
    """What can be said without the weights; `cls` itself.

    The test for the interface is transformers' own flag, `_supports_attention_backend`: set where
    a model's attention goes through `ALL_ATTENTION_FUNCTIONS` and its masks through the masks'.
    """
    if cls is None:
        raise _unsupported(config, "transformers has no causal language model of this type")
    if getattr(cls, "_is_stateful", False):
        raise _unsupported(config, "its layers keep a state beside attention's keys and values")
    if not getattr(cls, "_supports_attention_backend", False):
        raise _unsupported(
            config, f"{cls.__name__} does not go through transformers' attention interface"
        )
    kinds = set(getattr(config.get_text_config(), "layer_types", None) or ())
    if others := sorted(kinds - LAYER_TYPES):
        raise _unsupported(config, f"it has layers of {', '.join(others)}")
    return cls


def _check_size(folder: Path, cls: type, config: PreTrainedConfig) -> None:
    """Whether the files can hold what config.json describes, before memory is taken for it."""
    with torch.device("meta"), _loading(folder):
        model: PreTrainedModel = cls(copy.deepcopy(config))
        described = sum(parameter.numel() for parameter in model.parameters())
    stored = sum(file.stat().st_size for file in weight_files(folder))
    if described > stored * _MOST_WEIGHTS_IN_A_BYTE:
        raise InvalidCheckpoint(
            f"{folder}: config.json describes {described} weights, the files have {stored} bytes"
        )


@contextmanager
def _loading(folder: Path) -> Iterator[None]:
    """Foreign code over foreign files: what it raises has no common root."""
    try:
        yield
    except Exception as error:
        line = " ".join(str(error).split())[:_MAX_TEXT] or type(error).__name__
        raise InvalidCheckpoint(f"{folder} cannot be loaded: {line}") from error


def _check_layers(config: PreTrainedConfig, probe: _Probe) -> None:
    """What the probe saw must be what config.json announces."""
    kinds = getattr(config.get_text_config(), "layer_types", None) or ()
    announced = sum(kind == "sliding_attention" for kind in kinds)
    windowed = sum(spec.window is not None for spec in probe.specs)
    if not probe.specs:
        raise _unsupported(config, "it never calls transformers' attention interface")
    if windowed < announced:
        raise _unsupported(config, "its windowed layers do not name their window")


def _unsupported(config: PreTrainedConfig | None, why: str) -> UnsupportedModel:
    model_type = "unknown" if config is None else config.model_type
    return UnsupportedModel(f"model type {model_type} is not supported: {why}")


def _config_of(module: torch.nn.Module) -> PreTrainedConfig | None:
    return getattr(module, "config", None)


def _batch_of(stop: int, start: int, vocab_size: int, device: torch.device) -> ForwardBatch:
    """Tokens `start` to `stop` of one made-up sequence in block 1 of a cache of blocks of 8."""
    positions = torch.arange(start, stop, device=device)
    queries = Queries(
        block_tables=torch.ones((1, 1), dtype=torch.int64, device=device),
        query_lens=(stop - start,),
        kv_lens=(stop,),
        num_decodes=int(stop - start == 1),
    )
    return ForwardBatch(
        input_ids=(positions * 7 + 5) % vocab_size,
        positions=positions,
        slots=positions + 8,
        queries=queries,
        selected_rows=torch.arange(stop - start, device=device),
        selected=queries,
    )


@contextmanager
def _foreign_errors(config: PreTrainedConfig) -> Iterator[None]:
    """What a model's own code raises when it is called our way becomes `UnsupportedModel`."""
    try:
        yield
    except (
        *(ArithmeticError, AssertionError, AttributeError, LookupError),
        *(RuntimeError, TypeError, ValueError),
    ) as error:
        line = str(error).strip().partition("\n")[0]
        raise _unsupported(config, f"its first tokens fail: {line}") from error


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """transformers draws bars on stderr, which is the launcher's."""
    was_enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_enabled:
            logging.enable_progress_bar()
