"""The one decoder: every family of `families.py` is this code with other numbers.

It works on flat tensors, `[num_tokens, hidden]`: prompt chunks and decode tokens of all sequences
together. What a token sees of its own sequence is the business of `attend` alone. The stream that
layers add to is float32 whatever the weights are: on SmolLM2 in bfloat16 that halves the error of
the log probabilities (notes/0003) and costs nothing beside the matmuls.

On several ranks each holds its part of every matmul (`weights/sharding.py`) and of the cache, and
all hold the stream: two sums a layer, one for the embedding, one gathering of the logits.
"""

from collections.abc import Sequence

import torch

from kagami_shard.forward.kv_cache import LayerShape
from kagami_shard.layers.rotary import RotaryEmbedding
from kagami_shard.machine.distributed import TensorParallel
from kagami_shard.models.loading import DecoderLoader
from kagami_shard.models.ops import Ops, T
from kagami_shard.models.spec import ModelSpec
from kagami_shard.quantization.source import LinearSource, Scheme
from kagami_shard.weights.checkpoint import Checkpoint


class Decoder:
    """A model of `spec`, this rank's part of its weights on `device`; a `Model`."""

    def __init__(
        self,
        spec: ModelSpec,
        checkpoint: Checkpoint,
        *,
        dtype: torch.dtype,
        device: torch.device,
        parallel: TensorParallel,
        scheme: Scheme,
        defers: bool = False,
    ) -> None:
        """With `defers` matrices that stay as they are in the files are read when first used."""
        self._spec = spec
        self._scheme_name = scheme.name
        source = LinearSource(checkpoint, scheme, dtype=dtype, device=device, defers=defers)
        self._ropes = [RotaryEmbedding(rope, device) for rope in spec.ropes]
        load = DecoderLoader(spec, checkpoint, source, dtype, device, parallel)
        self._num_kv_heads = load.heads.num_kv_heads
        self._embedding = load.embedding()
        self._layers = [_Layer(spec, index, load) for index in range(len(spec.layers))]
        self._norm = load.norm(load.prefix + spec.names.final_norm)
        self._head = load.head(self._embedding)
        self._bytes_loaded = checkpoint.bytes_loaded

    @property
    def quantization(self) -> str:
        return self._scheme_name

    @property
    def model_type(self) -> str:
        return self._spec.model_type

    @property
    def layers(self) -> tuple[LayerShape, ...]:
        spec = self._spec
        return (LayerShape(self._num_kv_heads, spec.head_dim, spec.head_dim),) * len(spec.layers)

    @property
    def vocab_size(self) -> int:
        return self._head.vocab_size

    @property
    def max_positions(self) -> int:
        return self._spec.max_positions

    @property
    def bytes_loaded(self) -> int:
        return self._bytes_loaded

    @property
    def weight_bytes(self) -> int:
        layers = sum(layer.weight_bytes for layer in self._layers)
        return layers + self._norm.weight_bytes + self._head.weight_bytes

    def run(self, ops: Ops[T]) -> T:
        """The whole step in the operations of `ops`: the logits of the selected rows."""
        return self.logits(ops, self.hidden(ops))

    def hidden(self, ops: Ops[T]) -> T:
        """The step up to the last norm: what the head reads of the selected rows."""
        hidden = ops.embed(self._embedding)
        for layer in self._layers:
            hidden = layer(hidden, ops, is_last=layer is self._layers[-1])
        return ops.norm(hidden, self._norm)

    def logits(self, ops: Ops[T], hidden: T) -> T:
        """The rest of the step: logits of what `hidden` gave."""
        return ops.logits(hidden, self._head)

    @property
    def ropes(self) -> Sequence[RotaryEmbedding]:
        """Those that `SelfAttention.rope` counts."""
        return self._ropes


class _Layer:
    """Attention, then mlp, each added to the stream; norms before, after, or both.

    Of tokens whose logits nobody wants the last layer leaves keys and values, and nothing else.
    """

    def __init__(self, spec: ModelSpec, index: int, load: DecoderLoader) -> None:
        names = spec.names
        layer = f"{load.prefix}layers.{index}."
        self._multiplier = spec.residual_multiplier
        self._before_attention = load.norm_before(layer, names.before_attention)
        self._qkv = load.qkv(layer)
        self._attention = load.attention(index, layer)
        self._output = load.output(layer)
        self._after_attention = load.norm_after(layer, names.after_attention)
        self._before_mlp = load.norm_before(layer, names.before_mlp)
        self._mlp = load.mlp(layer)
        self._after_mlp = load.norm_after(layer, names.after_mlp)

    @property
    def weight_bytes(self) -> int:
        projections = (self._qkv, self._output, self._mlp)
        before = (self._before_attention, self._attention.qk_norm, self._before_mlp)
        norms = (*before, self._after_attention, self._after_mlp)
        return sum(part.weight_bytes for part in (*projections, *norms))

    def __call__(self, hidden: T, ops: Ops[T], *, is_last: bool) -> T:
        qkv = ops.linear(ops.norm(hidden, self._before_attention), self._qkv)
        queries = ops.write(qkv, self._attention)
        if is_last:
            hidden, queries = ops.select_rows(hidden, queries)
        update = ops.linear(ops.attend(queries, self._attention), self._output)
        hidden = ops.add(hidden, update, self._after_attention, self._multiplier)
        update = ops.mlp(ops.norm(hidden, self._before_mlp), self._mlp)
        return ops.add(hidden, update, self._after_mlp, self._multiplier)
