"""The one decoder: every family of `spec.py` is this code with other numbers.

It works on flat tensors, `[num_tokens, hidden]`: prompt chunks and decode tokens of all sequences
together. What a token sees of its own sequence is the business of `attend` alone. The stream that
layers add to is float32 whatever the weights are: on SmolLM2 in bfloat16 that halves the error of
the log probabilities (notes/0003) and costs nothing beside the matmuls.
"""

from typing import Protocol

import torch
from torch import Tensor

from kagami_proto.errors import UnsupportedModel
from kagami_shard.attention.base import AttentionSpec, AttentionStep
from kagami_shard.batch import ForwardBatch
from kagami_shard.kv_cache import LayerShape
from kagami_shard.layers.embedding import Embedding, Head
from kagami_shard.layers.linear import Linear, Projection
from kagami_shard.layers.mlp import ACTIVATIONS, MLP, GatedMLP
from kagami_shard.layers.norm import LayerNorm, Norm, RMSNorm, Rounding, no_norm
from kagami_shard.layers.rotary import RotaryEmbedding, Rotation, rotate
from kagami_shard.models.spec import ModelSpec, NormKind, QKNorm
from kagami_shard.weights.checkpoint import Checkpoint


class Decoder:
    """A model of `spec`, its weights on `device`; a `Model`."""

    def __init__(
        self, spec: ModelSpec, checkpoint: Checkpoint, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._spec = spec
        load = _Loader(spec, checkpoint, dtype, device)
        self._embedding = load.embedding()
        self._layers = [_Layer(spec, index, load) for index in range(len(spec.layers))]
        self._norm = load.norm(load.prefix + spec.names.final_norm)
        self._head = load.head(self._embedding)
        self._ropes = [RotaryEmbedding(rope, device) for rope in spec.ropes]
        self._bytes_loaded = checkpoint.bytes_loaded

    @property
    def model_type(self) -> str:
        return self._spec.model_type

    @property
    def layers(self) -> tuple[LayerShape, ...]:
        spec = self._spec
        return (LayerShape(spec.num_kv_heads, spec.head_dim, spec.head_dim),) * len(spec.layers)

    @property
    def vocab_size(self) -> int:
        return self._head.weight.shape[0]

    @property
    def max_positions(self) -> int:
        return self._spec.max_positions

    @property
    def bytes_loaded(self) -> int:
        return self._bytes_loaded

    def forward(self, batch: ForwardBatch, attend: AttentionStep) -> Tensor:
        """Logits after `batch.logits_rows`: `[num_rows, vocab_size]` float32."""
        hidden = self._embedding(batch.input_ids)
        rotations = [rope.rotation(batch.positions, hidden.dtype) for rope in self._ropes]
        hidden = hidden.float()
        for layer in self._layers:
            hidden = layer(hidden, rotations, attend)
        return self._head(self._norm(hidden.index_select(0, batch.logits_rows)))


class _Block(Protocol):
    """The mlp half, gated or not."""

    def __call__(self, hidden: Tensor) -> Tensor: ...


class _Loader:
    """Reads the parts of a model by their names."""

    def __init__(
        self, spec: ModelSpec, checkpoint: Checkpoint, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._spec = spec
        self._checkpoint = checkpoint
        self._dtype = dtype
        self._device = device
        embedding = f"{spec.names.embedding}.weight"
        prefixes = spec.names.prefixes
        self.prefix = next((p for p in prefixes if p + embedding in checkpoint), prefixes[0])

    def tensor(self, *names: str) -> Tensor:
        return self._checkpoint.load_rows(names, dtype=self._dtype, device=self._device)

    def embedding(self) -> Embedding:
        weight = self.tensor(f"{self.prefix}{self._spec.names.embedding}.weight")
        return Embedding(weight, self._spec.embedding_multiplier)

    def head(self, embedding: Embedding) -> Head:
        spec = self._spec
        weight = embedding.weight if spec.tied_head else self.tensor(f"{spec.names.head}.weight")
        return Head(weight, divisor=spec.logits_divisor, softcap=spec.logits_softcap)

    def linear(self, *names: str, bias: bool) -> Projection:
        return Linear(
            self.tensor(*(f"{name}.weight" for name in names)),
            self.tensor(*(f"{name}.bias" for name in names)) if bias else None,
        )

    def norm(self, name: str) -> Norm:
        weight = self.tensor(f"{name}.weight")
        if self._spec.norm is NormKind.LAYER:
            return LayerNorm(weight, self.tensor(f"{name}.bias"), self._spec.norm_eps)
        return self._rms_norm(weight)

    def _rms_norm(self, weight: Tensor) -> Norm:
        center = 1.0 if self._spec.norm is NormKind.RMS_ONE_CENTERED else 0.0
        return RMSNorm(weight, self._spec.norm_eps, center=center)

    def norm_before(self, layer: str, name: str | None) -> Norm:
        return Rounding(self._dtype) if name is None else self.norm(layer + name)

    def norm_after(self, layer: str, name: str | None) -> Norm:
        return no_norm if name is None else self.norm(layer + name)

    def qk_norm(self, layer: str) -> Norm:
        spec = self._spec
        of_query, of_key = (layer + name for name in spec.names.qk_norm)
        match spec.qk_norm:
            case QKNorm.NONE:
                return no_norm
            case QKNorm.PER_HEAD:
                weight_of_query = self.tensor(f"{of_query}.weight").expand(spec.num_heads, -1)
                weight_of_key = self.tensor(f"{of_key}.weight").expand(spec.num_kv_heads, -1)
                return self._rms_norm(torch.cat((weight_of_query, weight_of_key)))
            case QKNorm.FULL:
                return _FullNorm(spec.num_heads, self.norm(of_query), self.norm(of_key))

    def mlp(self, layer: str) -> _Block:
        spec = self._spec
        if (activation := ACTIVATIONS.get(spec.activation)) is None:
            raise UnsupportedModel(
                f"model type {spec.model_type}: activation {spec.activation!r} is none of "
                f"{', '.join(ACTIVATIONS)}"
            )
        up = self.linear(*(layer + name for name in spec.names.up), bias=spec.mlp_bias)
        down = self.linear(layer + spec.names.down, bias=spec.mlp_bias)
        return GatedMLP(up, down, activation) if spec.gated else MLP(up, down, activation)


class _Layer:
    """Attention, then mlp, each added to the stream; norms before, after, or both."""

    def __init__(self, spec: ModelSpec, index: int, load: _Loader) -> None:
        names = spec.names
        layer = f"{load.prefix}layers.{index}."
        self._rope = spec.layers[index].rope
        self._multiplier = spec.residual_multiplier
        self._before_attention = load.norm_before(layer, names.before_attention)
        self._attention = _SelfAttention(spec, index, layer, load)
        self._after_attention = load.norm_after(layer, names.after_attention)
        self._before_mlp = load.norm_before(layer, names.before_mlp)
        self._mlp = load.mlp(layer)
        self._after_mlp = load.norm_after(layer, names.after_mlp)

    def __call__(self, hidden: Tensor, rotations: list[Rotation], attend: AttentionStep) -> Tensor:
        update = self._attention(self._before_attention(hidden), rotations[self._rope], attend)
        hidden = hidden.add(self._after_attention(update), alpha=self._multiplier)
        update = self._mlp(self._before_mlp(hidden))
        return hidden.add(self._after_mlp(update), alpha=self._multiplier)


class _SelfAttention:
    """One matmul for query, key and value; norms and turns of query and key in one go."""

    def __init__(self, spec: ModelSpec, index: int, layer: str, load: _Loader) -> None:
        names = spec.names
        self._num_heads = spec.num_heads
        self._num_kv_heads = spec.num_kv_heads
        self._head_dim = spec.head_dim
        self._qkv = load.linear(*(layer + name for name in names.qkv), bias=spec.qkv_bias)
        self._output = load.linear(layer + names.output, bias=spec.output_bias)
        self._qk_norm = load.qk_norm(layer)
        self._spec = AttentionSpec(
            layer=index,
            scale=spec.attention_scale,
            window=spec.layers[index].window,
            softcap=spec.attention_softcap,
        )

    def __call__(self, hidden: Tensor, rotation: Rotation, attend: AttentionStep) -> Tensor:
        num_tokens = hidden.shape[0]
        heads = self._qkv(hidden).view(num_tokens, -1, self._head_dim)
        query_key, value = heads.tensor_split((self._num_heads + self._num_kv_heads,), dim=1)
        query_key = rotate(self._qk_norm(query_key), rotation)
        query, key = query_key.tensor_split((self._num_heads,), dim=1)
        return self._output(attend(query, key, value, self._spec).view(num_tokens, -1))


class _FullNorm:
    """Queries over all their heads together, keys over theirs (OLMo 2, arXiv:2501.00656)."""

    def __init__(self, num_heads: int, of_query: Norm, of_key: Norm) -> None:
        self._num_heads = num_heads
        self._of_query = of_query
        self._of_key = of_key

    def __call__(self, hidden: Tensor) -> Tensor:
        """`[num_tokens, num_heads + num_kv_heads, head_dim]`"""
        query, key = hidden.tensor_split((self._num_heads,), dim=1)
        normed = (self._of_query(query.flatten(1)), self._of_key(key.flatten(1)))
        return torch.cat(normed, dim=1).view(hidden.shape)
