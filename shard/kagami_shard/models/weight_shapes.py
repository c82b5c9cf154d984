"""Every tensor of a decoder beside what config.json says of it, before the first one is read.

Whoever reads, packs or multiplies weights later takes sizes from the spec, and memory from the
tensors: here they are made to agree. Only headers are read, so a file costs nothing but its names.
"""

from collections.abc import Iterator
from typing import NamedTuple

from kagami_shard.models.spec import ModelSpec, NormKind, QKNorm
from kagami_shard.quantization.source import LinearSource
from kagami_shard.weights.checkpoint import Checkpoint


class _Linear(NamedTuple):
    """A matrix `[rows, columns]`, and whether a bias is beside it."""

    module: str
    rows: int
    columns: int
    has_bias: bool = False


def check_weight_shapes(
    spec: ModelSpec, prefix: str, checkpoint: Checkpoint, source: LinearSource
) -> None:
    """All that the decoder of `spec` will read; raises `InvalidCheckpoint` for the first that is
    missing, or another than config.json says.
    """
    checkpoint.check(f"{prefix}{spec.names.embedding}.weight", (spec.vocab_size, spec.hidden_size))
    for linear in _linears(spec, prefix):
        source.check(linear.module, (linear.rows, linear.columns))
        if linear.has_bias:
            checkpoint.check(f"{linear.module}.bias", (linear.rows,))
    for module, width in _norms(spec, prefix):
        checkpoint.check(f"{module}.weight", (width,))
        if spec.norm is NormKind.LAYER:
            checkpoint.check(f"{module}.bias", (width,))


def _linears(spec: ModelSpec, prefix: str) -> Iterator[_Linear]:
    names, hidden, inner = spec.names, spec.hidden_size, spec.intermediate_size
    queries, keys = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    for index in range(len(spec.layers)):
        layer = f"{prefix}layers.{index}."
        for name, rows in _sections(names.qkv, (queries, keys, keys)):
            yield _Linear(layer + name, rows, hidden, spec.qkv_bias)
        yield _Linear(layer + names.output, hidden, queries, spec.output_bias)
        for name, rows in _sections(names.up, (inner,) * (1 + spec.gated)):
            yield _Linear(layer + name, rows, hidden, spec.mlp_bias)
        yield _Linear(layer + names.down, hidden, inner, spec.mlp_bias)
    if not spec.tied_head:
        yield _Linear(names.head, spec.vocab_size, hidden)


def _sections(names: tuple[str, ...], rows: tuple[int, ...]) -> Iterator[tuple[str, int]]:
    """The rows of each name: of its own section, or of all where the checkpoint has them in one."""
    yield from zip(names, rows if len(names) == len(rows) else (sum(rows),), strict=True)


def _norms(spec: ModelSpec, prefix: str) -> Iterator[tuple[str, int]]:
    names = spec.names
    around = (names.before_attention, names.after_attention, names.before_mlp, names.after_mlp)
    queries, keys = {
        QKNorm.NONE: (0, 0),
        QKNorm.PER_HEAD: (spec.head_dim, spec.head_dim),
        QKNorm.FULL: (spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim),
    }[spec.qk_norm]
    for index in range(len(spec.layers)):
        layer = f"{prefix}layers.{index}."
        yield from ((layer + name, spec.hidden_size) for name in around if name is not None)
        if queries:
            yield from zip((layer + name for name in names.qk_norm), (queries, keys), strict=True)
    yield prefix + names.final_norm, spec.hidden_size
