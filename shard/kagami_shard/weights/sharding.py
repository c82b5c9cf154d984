"""Which part of a weight belongs to a rank: spans of rows and columns, and the heads they hold.

Megatron's cut (arXiv:1909.08053, section 3): the matmul that opens attention or the mlp is cut by
its output (rows of the weight), the one that closes it by its input (columns), so that one sum
over the ranks ends each half of a layer. Pure arithmetic; reads nothing.
"""

from collections.abc import Sequence
from typing import NamedTuple

from kagami_proto.errors import UnsupportedModel

Span = tuple[int, int]
"""First, and one past the last"""


def span_of(total: int, rank: int, size: int) -> Span:
    """A rank's part of `total` things; parts differ by one at most and may be empty."""
    return total * rank // size, total * (rank + 1) // size


def padded_span_of(total: int, rank: int, size: int) -> Span:
    """The same, but every part that starts before the end has the length of the first."""
    length = -(-total // size)
    return min(total, rank * length), min(total, (rank + 1) * length)


def spans_in_sections(sections: Sequence[Span], lengths: Sequence[int]) -> list[Span]:
    """Spans counted from the start of their section become spans of all sections together."""
    spans = []
    first = 0
    for (start, stop), length in zip(sections, lengths, strict=True):
        spans.append((first + start, first + stop))
        first += length
    return spans


class Heads(NamedTuple):
    """The attention heads that one rank computes."""

    queries: Span
    keys: Span
    """Of keys and values alike"""
    copies: int
    """How many ranks hold each of these keys"""

    @property
    def num_heads(self) -> int:
        return self.queries[1] - self.queries[0]

    @property
    def num_kv_heads(self) -> int:
        return self.keys[1] - self.keys[0]


def heads_of(model_type: str, num_heads: int, num_kv_heads: int, rank: int, size: int) -> Heads:
    """A rank's heads: equal numbers of queries, and the keys that they look at.

    With fewer keys than ranks a key is held by as many ranks as share it. Raises
    `UnsupportedModel` where the numbers do not divide.
    """
    if num_heads % size:
        raise UnsupportedModel(
            f"model type {model_type} cannot be cut: `num_heads` must be divisible by "
            f"`num_shards` (got `num_heads`: {num_heads} and `num_shards`: {size}): choose "
            "another --num-shard"
        )
    if num_kv_heads % size and size % num_kv_heads:
        raise UnsupportedModel(
            f"model type {model_type} cannot be cut: `num_key_value_heads` must be divisible by "
            f"`num_shards`, or divide it (got `num_key_value_heads`: {num_kv_heads} and "
            f"`num_shards`: {size}): choose another --num-shard"
        )
    copies = max(1, size // num_kv_heads)
    keys = span_of(num_kv_heads, rank // copies, size // copies)
    return Heads(span_of(num_heads, rank, size), keys, copies)
