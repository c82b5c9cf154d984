"""The verbs a decoder is written in, and their meaning in torch.

A `Decoder` is one definition for every device: it says in these verbs what happens to the stream.
`TorchOps` does it at once; a recorder (`graphs.py`) notes it down, to be replayed in one call.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from torch import Tensor

from kagami_shard.forward.batch import ForwardBatch
from kagami_shard.layers.attention import AttentionSpec, AttentionStep
from kagami_shard.layers.embedding import Embedding, Head
from kagami_shard.layers.linear import Projection
from kagami_shard.layers.mlp import MLP, GatedMLP
from kagami_shard.layers.norm import Norm
from kagami_shard.layers.rotary import RotaryEmbedding, Rotation, rotate

T = TypeVar("T")
"""A value of the step, one row for each token: a tensor, or what stands for it"""


@dataclass(frozen=True, slots=True, eq=False)
class SelfAttention:
    """What happens between the two matmuls of an attention."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: int
    """Index of the rope"""
    qk_norm: Norm
    """Of `[num_tokens, num_heads + num_kv_heads, head_dim]`"""
    spec: AttentionSpec


class Ops(Protocol[T]):
    """One step, forward."""

    def embed(self, embedding: Embedding) -> T:
        """The stream, float32."""

    def norm(self, hidden: T, norm: Norm) -> T:
        """What a matmul reads."""

    def linear(self, hidden: T, projection: Projection) -> T: ...

    def write(self, qkv: T, attention: SelfAttention) -> T:
        """Norms, turns, and keys and values into the cache; the queries."""

    def attend(self, queries: T, attention: SelfAttention) -> T: ...

    def keep(self, *values: T) -> tuple[T, ...]:
        """Of these the rows that the step wants logits after: from here on there are no others.

        Once in a step. What was written into the cache before it is there for all tokens.
        """

    def mlp(self, hidden: T, mlp: GatedMLP | MLP) -> T: ...

    def add(self, hidden: T, update: T, norm: Norm, factor: float) -> T:
        """`hidden + factor * norm(update)`"""

    def logits(self, hidden: T, norm: Norm, head: Head) -> T:
        """Of the rows that are kept; float32."""


class TorchOps:
    """Every verb at once, on any device."""

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

    def keep(self, *values: Tensor) -> tuple[Tensor, ...]:
        if self._batch.kept is self._batch.queries:
            return values
        self._attend = self._attend.kept()
        return tuple(value.index_select(0, self._batch.logits_rows) for value in values)

    def mlp(self, hidden: Tensor, mlp: GatedMLP | MLP) -> Tensor:
        return mlp(hidden)

    def add(self, hidden: Tensor, update: Tensor, norm: Norm, factor: float) -> Tensor:
        return hidden.add(norm(update), alpha=factor)

    def logits(self, hidden: Tensor, norm: Norm, head: Head) -> Tensor:
        return head(norm(hidden))
