"""A decoder's operations in torch, each computed at once, on any device."""

from collections.abc import Sequence

from torch import Tensor

from kagami_shard.forward.batch import ForwardBatch
from kagami_shard.layers.attention import AttentionStep
from kagami_shard.layers.embedding import Embedding, Head
from kagami_shard.layers.linear import Projection
from kagami_shard.layers.mlp import MLP, GatedMLP
from kagami_shard.layers.norm import Norm
from kagami_shard.layers.rotary import RotaryEmbedding, Rotation, rotate
from kagami_shard.models.ops import SelfAttention


class TorchOps:
    """The `Ops` of one step; every other implementation is compared with this one."""

    def __init__(
        self, batch: ForwardBatch, attend: AttentionStep, ropes: Sequence[RotaryEmbedding]
    ) -> None:
        self._batch = batch
        self._attend = attend
        self._ropes = ropes
        self._rotations: list[Rotation] = []

    def embed(self, embedding: Embedding) -> Tensor:
        hidden = embedding(self._batch.input_ids)
        self._rotations = [
            rope.rotation(self._batch.positions, hidden.dtype) for rope in self._ropes
        ]
        return hidden.float()

    def norm(self, hidden: Tensor, norm: Norm) -> Tensor:
        return norm(hidden)

    def linear(self, hidden: Tensor, projection: Projection) -> Tensor:
        return projection(hidden)

    def write(self, qkv: Tensor, attention: SelfAttention) -> Tensor:
        num_tokens, num_heads = qkv.shape[0], attention.num_heads
        heads = qkv.view(num_tokens, -1, attention.head_dim)
        query_key, value = heads.tensor_split((num_heads + attention.num_kv_heads,), dim=1)
        query_key = rotate(attention.qk_norm(query_key), self._rotations[attention.rope])
        query, key = query_key.tensor_split((num_heads,), dim=1)
        self._attend.write(key, value, attention.spec)
        return query

    def attend(self, queries: Tensor, attention: SelfAttention) -> Tensor:
        return self._attend.attend(queries, attention.spec).flatten(1)

    def select_rows(self, *values: Tensor) -> tuple[Tensor, ...]:
        if self._batch.selected is self._batch.queries:
            return values
        self._attend = self._attend.selected()
        return tuple(value.index_select(0, self._batch.selected_rows) for value in values)

    def mlp(self, hidden: Tensor, mlp: GatedMLP | MLP) -> Tensor:
        return mlp(hidden)

    def add(self, hidden: Tensor, update: Tensor, norm: Norm, factor: float) -> Tensor:
        return hidden.add(norm(update), alpha=factor)

    def logits(self, hidden: Tensor, head: Head) -> Tensor:
        return head(hidden)
