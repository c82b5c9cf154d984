"""A decoder's parts, read from its checkpoint.

On several ranks each holds its part of every matmul (`weights/sharding.py`) and of the cache.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from kagami_proto.errors import UnsupportedModel
from kagami_shard.layers.attention import AttentionSpec
from kagami_shard.layers.embedding import Embedding, Head, ShardedEmbedding, ShardedHead
from kagami_shard.layers.linear import Projection, RowLinear, projection
from kagami_shard.layers.mlp import ACTIVATIONS, MLP, GatedMLP
from kagami_shard.layers.norm import (
    FullNorm,
    LayerNorm,
    Norm,
    RMSNorm,
    Rounding,
    ShardedRMSNorm,
    no_norm,
)
from kagami_shard.machine.distributed import TensorParallel
from kagami_shard.models.ops import SelfAttention
from kagami_shard.models.spec import ModelSpec, NormKind, QKNorm
from kagami_shard.models.weight_shapes import check_weight_shapes
from kagami_shard.quantization.base import DenseWeight, Weight
from kagami_shard.quantization.source import LinearSource
from kagami_shard.weights.checkpoint import Checkpoint
from kagami_shard.weights.finite import check_finite
from kagami_shard.weights.sharding import (
    Span,
    heads_of,
    padded_span_of,
    span_of,
    spans_in_sections,
)
from kagami_shard.weights.stored import StoredRows, tensor_of


class DecoderLoader:
    """Reads this rank's part of a model by its names.

    Before the first weight is read all are compared with `spec`. Raises `InvalidCheckpoint`.
    """

    def __init__(
        self,
        spec: ModelSpec,
        checkpoint: Checkpoint,
        source: LinearSource,
        dtype: torch.dtype,
        device: torch.device,
        parallel: TensorParallel,
    ) -> None:
        self._spec = spec
        self._checkpoint = checkpoint
        self._source = source
        self._dtype = dtype
        self._device = device
        self._parallel = parallel
        self.heads = heads_of(
            spec.model_type, spec.num_heads, spec.num_kv_heads, parallel.rank, parallel.size
        )
        embedding = f"{spec.names.embedding}.weight"
        prefixes = spec.names.prefixes
        self.prefix = next((p for p in prefixes if p + embedding in checkpoint), prefixes[0])
        check_weight_shapes(spec, self.prefix, checkpoint, source)

    def tensor(self, *names: str, rows: Sequence[Span] | None = None) -> Tensor:
        return self._checkpoint.load_rows(names, dtype=self._dtype, device=self._device, rows=rows)

    def embedding(self) -> Embedding:
        name = f"{self.prefix}{self._spec.names.embedding}.weight"
        multiplier = self._spec.embedding_multiplier
        check_finite(self._checkpoint, name, self._dtype)
        if self._parallel.size == 1:
            return Embedding(self._source.rows([name]), multiplier)
        weight, first = self._vocabulary_part(name)
        return ShardedEmbedding(weight, multiplier, first=first, parallel=self._parallel)

    def head(self, embedding: Embedding) -> Head:
        spec = self._spec
        embedding_name = f"{self.prefix}{spec.names.embedding}"
        name = embedding_name if spec.tied_head else spec.names.head
        vocab_size = spec.vocab_size
        project = projection(self._head_weight(name, embedding))
        if self._parallel.size == 1:
            return Head(
                project, vocab_size, divisor=spec.logits_divisor, softcap=spec.logits_softcap
            )
        return ShardedHead(
            project,
            vocab_size,
            divisor=spec.logits_divisor,
            softcap=spec.logits_softcap,
            parallel=self._parallel,
        )

    def _head_weight(self, name: str, embedding: Embedding) -> Weight | StoredRows:
        if self._spec.tied_head:
            return self._source.head_of(embedding.source)
        if self._source.is_quantized(name):
            return self._quantized_head(name)
        weight = f"{name}.weight"
        check_finite(self._checkpoint, weight, self._dtype)
        if self._parallel.size == 1:
            return self._source.head_of(self._source.rows([weight]))
        return self._source.head_of(self._vocabulary_part(weight)[0])

    def _quantized_head(self, name: str) -> Weight | StoredRows:
        if self._parallel.size == 1:
            return self._source.load([name])
        vocab_size = self._spec.vocab_size
        part = self._source.load([name], rows=[self._vocabulary_span(vocab_size)])
        matrix = tensor_of(part) if isinstance(part, StoredRows) else part.dequantized(self._dtype)
        return DenseWeight(self._padded(matrix, vocab_size))

    def _vocabulary_part(self, name: str) -> tuple[Tensor, int]:
        """This rank's rows, padded by zeros to as many as every other's; the first's id."""
        vocab_size = self._spec.vocab_size
        span = self._vocabulary_span(vocab_size)
        return self._padded(self.tensor(name, rows=[span]), vocab_size), span[0]

    def _vocabulary_span(self, vocab_size: int) -> Span:
        return padded_span_of(vocab_size, self._parallel.rank, self._parallel.size)

    def _padded(self, weight: Tensor, vocab_size: int) -> Tensor:
        num_missing = -(-vocab_size // self._parallel.size) - weight.shape[0]
        return pad(weight, (0, 0, 0, num_missing)) if num_missing else weight

    def _column_linear(
        self, names: Sequence[str], sections: Sequence[Span], lengths: Sequence[int], *, bias: bool
    ) -> Projection:
        """Cut by its output, of which this rank has the span `sections[i]` of section i."""
        rows = spans_in_sections(sections, lengths)
        return projection(
            self._source.load(names, rows=rows),
            self.tensor(*(f"{name}.bias" for name in names), rows=rows) if bias else None,
        )

    def _row_linear(self, name: str, columns: Span, *, bias: bool) -> Projection:
        """Cut by its input."""
        full_bias = self.tensor(f"{name}.bias") if bias else None
        if self._parallel.size == 1:
            return projection(self._source.load([name]), full_bias)
        weight = self._source.load([name], columns=columns)
        return RowLinear(projection(weight), full_bias, self._parallel)

    def qkv(self, layer: str) -> Projection:
        spec, heads = self._spec, self.heads
        return self._column_linear(
            [layer + name for name in spec.names.qkv],
            [self._of_heads(span) for span in (heads.queries, heads.keys, heads.keys)],
            [n * spec.head_dim for n in (spec.num_heads, spec.num_kv_heads, spec.num_kv_heads)],
            bias=spec.qkv_bias,
        )

    def attention(self, index: int, layer: str) -> SelfAttention:
        spec = self._spec
        return SelfAttention(
            self.heads.num_heads,
            self.heads.num_kv_heads,
            spec.head_dim,
            spec.layers[index].rope,
            self.qk_norm(layer),
            AttentionSpec(
                layer=index,
                scale=spec.attention_scale,
                window=spec.layers[index].window,
                softcap=spec.attention_softcap,
            ),
        )

    def output(self, layer: str) -> Projection:
        columns = self._of_heads(self.heads.queries)
        return self._row_linear(
            layer + self._spec.names.output, columns, bias=self._spec.output_bias
        )

    def _of_heads(self, heads: Span) -> Span:
        return heads[0] * self._spec.head_dim, heads[1] * self._spec.head_dim

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
                num_heads, num_kv_heads = self.heads.num_heads, self.heads.num_kv_heads
                weight_of_query = self.tensor(f"{of_query}.weight").expand(num_heads, -1)
                weight_of_key = self.tensor(f"{of_key}.weight").expand(num_kv_heads, -1)
                return self._rms_norm(torch.cat((weight_of_query, weight_of_key)))
            case QKNorm.FULL:
                heads = self.heads
                return FullNorm(
                    heads.num_heads,
                    self._full_norm(of_query, heads.queries, spec.num_heads),
                    self._full_norm(of_key, heads.keys, spec.num_kv_heads * heads.copies),
                )

    def _full_norm(self, name: str, heads: Span, num_heads: int) -> Norm:
        """Over all heads together, `num_heads` counting each copy of one."""
        if self._parallel.size == 1:
            return self.norm(name)
        return ShardedRMSNorm(
            self.tensor(f"{name}.weight", rows=[self._of_heads(heads)]),
            self._spec.norm_eps,
            width=num_heads * self._spec.head_dim,
            parallel=self._parallel,
        )

    def mlp(self, layer: str) -> GatedMLP | MLP:
        spec = self._spec
        if (activation := ACTIVATIONS.get(spec.activation)) is None:
            raise UnsupportedModel(
                f"model type {spec.model_type}: activation {spec.activation!r} is none of "
                f"{', '.join(ACTIVATIONS)}"
            )
        down_name = layer + spec.names.down
        width = spec.intermediate_size
        span = span_of(width, self._parallel.rank, self._parallel.size)
        up = self._column_linear(
            [layer + name for name in spec.names.up],
            [span] * (1 + spec.gated),
            [width] * (1 + spec.gated),
            bias=spec.mlp_bias,
        )
        down = self._row_linear(down_name, span, bias=spec.mlp_bias)
        return GatedMLP(up, down, activation) if spec.gated else MLP(up, down, activation)
