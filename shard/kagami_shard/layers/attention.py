"""Attention as a layer sees it.

An `AttentionStep` is made once for a step. Every layer calls it with fresh queries, keys and
values; it writes the keys and values into the cache and attends. The last layer attends with those
tokens alone that the batch selects.
"""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class AttentionSpec:
    """What is fixed for one layer."""

    layer: int
    """Index into the cache"""
    scale: float
    """Factor on the scores, usually head_dim ** -0.5"""
    window: int | None = None
    """A token sees itself and the `window - 1` tokens before it; None: all of them"""
    softcap: float | None = None
    """Scores become `softcap * tanh(scores / softcap)` (Gemma 2, arXiv:2408.00118)"""
    sinks: Tensor | None = None
    """`[num_heads]`, one more score per head that takes weight and gives nothing (gpt-oss)"""


class AttentionStep(Protocol):
    """Attention over one step's tokens."""

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, spec: AttentionSpec) -> Tensor:
        """Write `key`, `value` (`[num_tokens, num_kv_heads, dim]`), attend with `query`.

        `query` is `[num_tokens, num_heads, head_dim]`; returns `[num_tokens, num_heads,
        value_dim]`.
        """

    def write(self, key: Tensor, value: Tensor, spec: AttentionSpec) -> None:
        """The first half of a call."""

    def attend(self, query: Tensor, spec: AttentionSpec) -> Tensor:
        """The second half of a call, over what has been written."""

    def selected(self) -> "AttentionStep":
        """A step that attends with the queries of `batch.selected`, and writes as this one."""
