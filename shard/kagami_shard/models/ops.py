"""The operations that a decoder is written in.

A `Decoder` is one definition for every device: it says in these operations what happens to the
stream. A backend gives them a meaning: torch computes each at once (`backends/torch/ops.py`), the
native recorder notes them down to be replayed in one call (`backends/native/recorder.py`).
"""

from dataclasses import dataclass
from typing import Protocol, TypeVar

from kagami_shard.layers.attention import AttentionSpec
from kagami_shard.layers.embedding import Embedding, Head
from kagami_shard.layers.linear import Projection
from kagami_shard.layers.mlp import MLP, GatedMLP
from kagami_shard.layers.norm import Norm

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
        """Norm and rotate, write keys and values into the cache, and give the queries."""

    def attend(self, queries: T, attention: SelfAttention) -> T: ...

    def select_rows(self, *values: T) -> tuple[T, ...]:
        """The rows of each value that the step wants logits for; all that follows has these alone.

        Once in a step. What was written into the cache before is there for all tokens.
        """

    def mlp(self, hidden: T, mlp: GatedMLP | MLP) -> T: ...

    def add(self, hidden: T, update: T, norm: Norm, factor: float) -> T:
        """`hidden + factor * norm(update)`"""

    def logits(self, hidden: T, head: Head) -> T:
        """Of rows behind the last norm; float32."""
