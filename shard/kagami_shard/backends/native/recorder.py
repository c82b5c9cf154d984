"""Record a step once, replay it in one call: the native tape of a CPU.

`record` runs a decoder with operations that compute nothing: each notes which op of the library
reads which buffer. The size of a step is an argument of the replay, so one recording serves all
steps. At the end the weights are packed; the decoder has given them away and can compute no more.
"""

import ctypes
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from kagami_shard.backends.native.library import (
    LOGITS,
    SCRATCH_BYTES,
    Activation,
    CAttention,
    CBuffer,
    CEmbedding,
    CNorm,
    Code,
    COp,
    CQuantize,
    CRope,
    Epilogue,
    NormKind,
    QKNorm,
    count_of,
    pointer,
)
from kagami_shard.backends.native.packing import (
    Packable,
    PackedWeight,
    Packer,
    hadamard_block,
    is_packable,
    pack,
)
from kagami_shard.backends.native.runtime import Runtime
from kagami_shard.backends.native.tape import Tape
from kagami_shard.layers.embedding import Embedding, Head
from kagami_shard.layers.linear import Linear, Projection
from kagami_shard.layers.mlp import ACTIVATIONS, MLP, GatedMLP
from kagami_shard.layers.norm import FullNorm, LayerNorm, Norm, RMSNorm, Rounding, no_norm
from kagami_shard.layers.rotary import RotaryEmbedding
from kagami_shard.models.ops import Ops, SelfAttention, T

# attention.cpp has room for these.
_MAX_HEAD_DIM = 256
_MAX_GROUP = 64
# A thread's scratch holds so many columns as float32.
_MAX_QUANTIZED = SCRATCH_BYTES // 4

_ACTIVATIONS: Mapping[str, Activation] = {
    "silu": Activation.SILU,
    "gelu": Activation.GELU,
    "gelu_pytorch_tanh": Activation.GELU_TANH,
    "relu": Activation.RELU,
}


class NotRecordable(Exception):
    """The library has no op for this model; the reason in one line."""


class Recordable(Protocol):
    """A decoder, or a part of one."""

    @property
    def ropes(self) -> Sequence[RotaryEmbedding]: ...

    def run(self, ops: Ops[T]) -> T: ...


class Buffer(NamedTuple):
    """A buffer of the tape, by its number; a row for each token of the step."""

    number: int
    columns: int


class PendingMatmul(NamedTuple):
    """A matmul that is not recorded yet: what comes after it decides its epilogue."""

    input: Buffer
    projection: Packable


Value = Buffer | PendingMatmul


@dataclass(frozen=True, slots=True)
class _Op:
    """A `COp` whose parameters are made when the weights are packed."""

    code: Code
    input: int
    output: int
    params: Callable[[], ctypes.Structure] | None
    selected: bool
    index: int = 0
    epilogue: Epilogue = Epilogue.STORE_FLOAT
    activation: Activation = Activation.NONE
    alpha: float = 1.0
    bound: float = 0.0


class Recorder:
    """An `Ops` whose operations are recorded."""

    def __init__(self, decoder: Recordable, packer: Packer) -> None:
        self._packer = packer
        self._ropes = decoder.ropes
        self._ops: list[_Op] = []
        self._shapes: list[CBuffer] = []
        self._buffers: dict[str, Buffer] = {}
        self._tensors: list[Tensor] = []
        """What the ops point to, beside packed weights"""
        self._packed: dict[int, PackedWeight] = {}
        """By the projection's identity"""
        self._tied_head: Linear | None = None
        self._has_selected = False
        self._vocab_size = 0

    # ------------------------------------------------------------------ the operations

    def embed(self, embedding: Embedding) -> Value:
        if type(embedding) is not Embedding:
            raise NotRecordable("its embedding lies on several ranks")
        width = embedding.source.shape[1]
        self._embedded = embedding
        stream = self._buffer("stream", width, torch.float32)
        self._note(Code.EMBED, None, stream, self._embedding)
        for index, rope in enumerate(self._ropes):
            half = len(rope.frequencies)
            tables = self._buffer(f"rope {index}", 2 * half, torch.float32)
            frequencies = rope.frequencies.float().contiguous()
            struct = CRope(
                half, rope.attention_factor, self._pointer(frequencies), len(frequencies)
            )
            self._note(Code.ROPE, None, tables, partial(_same, struct))
        return stream

    def norm(self, hidden: Value, norm: Norm) -> Value:
        return self._norm(self._finished(hidden, "update"), norm)

    def linear(self, hidden: Value, projection: Projection) -> PendingMatmul:
        if not is_packable(projection):
            raise NotRecordable(f"{type(projection).__name__} has no packed form")
        return PendingMatmul(_buffer_of(hidden), projection)

    def write(self, qkv: Value, attention: SelfAttention) -> Value:
        dim, group = attention.head_dim, attention.num_heads // attention.num_kv_heads
        if dim > _MAX_HEAD_DIM or group > _MAX_GROUP or dim % 2:
            raise NotRecordable(f"{group} queries share a key of {dim} dimensions")
        if attention.spec.sinks is not None:
            raise NotRecordable("its attention has sinks")
        heads = self._finished(qkv, "heads")
        struct = self._attention(attention)
        tables = self._buffers[f"rope {attention.rope}"]
        self._note(Code.WRITE, heads, heads, partial(_same, struct), index=tables.number)
        return heads

    def attend(self, queries: Value, attention: SelfAttention) -> Value:
        columns = attention.num_heads * attention.head_dim
        output = self._buffer("attended", columns, torch.bfloat16)
        struct = self._attention(attention)
        self._note(Code.ATTEND, _buffer_of(queries), output, partial(_same, struct))
        return output

    def select_rows(self, *values: Value) -> tuple[Value, ...]:
        sources = [self._finished(value, "update") for value in values]
        self._has_selected = True
        return tuple(self._selected_rows(source) for source in sources)

    def mlp(self, hidden: Value, mlp: GatedMLP | MLP) -> Value:
        up, gated = (mlp.gate_up, True) if isinstance(mlp, GatedMLP) else (mlp.up, False)
        product = self.linear(hidden, up)
        columns = product.projection.out_features // (2 if gated else 1)
        output = self._buffer("activated", columns, torch.bfloat16)
        self._product(
            product,
            output,
            Epilogue.GATED if gated else Epilogue.STORE_BF16,
            activation=_activation(mlp),
            gated=gated,
        )
        return self.linear(output, mlp.down)

    def add(self, hidden: Value, update: Value, norm: Norm, factor: float) -> Value:
        stream = _buffer_of(hidden)
        if norm is no_norm and isinstance(update, PendingMatmul):
            self._product(update, stream, Epilogue.ADD, alpha=factor)
            return stream
        source = self._finished(update, "update")
        struct = self._norm_struct(norm, stream.columns)
        self._note(Code.ADD_NORM, source, stream, partial(_same, struct), alpha=factor)
        return stream

    def logits(self, hidden: Value, head: Head) -> Value:
        if type(head) is not Head:
            raise NotRecordable("its head lies on several ranks")
        project = head.project
        if not is_packable(project):
            raise NotRecordable(f"its head, {type(project).__name__}, has no packed form")
        if isinstance(project, Linear) and project.source is self._embedded.source:
            self._tied_head = project
        product = PendingMatmul(_buffer_of(hidden), project)
        capped = head.softcap is not None
        self._vocab_size = head.vocab_size
        self._product(
            product,
            Buffer(LOGITS, head.vocab_size),
            Epilogue.STORE_FLOAT,
            activation=Activation.SOFTCAP if capped else Activation.NONE,
            alpha=1.0 / head.divisor,
            bound=head.softcap or 0.0,
        )
        return Buffer(LOGITS, head.vocab_size)

    # ------------------------------------------------------------------ notes

    def _note(
        self,
        code: Code,
        source: Buffer | None,
        output: Buffer,
        params: Callable[[], ctypes.Structure] | None,
        **fields: object,
    ) -> None:
        number = source.number if source else 0
        op = _Op(code, number, output.number, params, self._has_selected, **fields)  # type: ignore[arg-type]  # the fields of _Op, by name
        self._ops.append(op)

    def _product(
        self,
        product: PendingMatmul,
        output: Buffer,
        epilogue: Epilogue,
        *,
        gated: bool = False,
        **fields: object,
    ) -> None:
        projection, source = product.projection, product.input
        if block := hadamard_block(projection):
            source = self._quantized(source, block)

        def params() -> ctypes.Structure:
            weight = pack(projection, self._packer, gated=gated)
            self._packed[id(projection)] = weight
            return weight.struct()

        self._note(Code.LINEAR, source, output, params, epilogue=epilogue, **fields)

    def _quantized(self, source: Buffer, block: int) -> Buffer:
        """`source` in 8 bits; where every thread has its own copy of it, of this too."""
        if source.columns > _MAX_QUANTIZED:
            raise NotRecordable(f"activations of {source.columns} columns are in 8 bits")
        is_replicated = source == self._buffers.get("normed")
        name = f"8 bits of {source.columns}{', replicated' if is_replicated else ''}"
        # quantized.h: the values, padded, and a line for the scale.
        columns = -(-source.columns // 64) * 64 + 64
        output = self._buffer(name, columns, torch.uint8, is_replicated=is_replicated)
        struct = CQuantize(source.columns, block)
        self._note(Code.QUANTIZE, source, output, partial(_same, struct))
        return output

    def _finished(self, value: Value, name: str) -> Buffer:
        """As float32 in the buffer `name`."""
        if isinstance(value, Buffer):
            return value
        output = self._buffer(name, value.projection.out_features, torch.float32)
        self._product(value, output, Epilogue.STORE_FLOAT)
        return output

    def _norm(self, hidden: Buffer, norm: Norm) -> Buffer:
        output = self._buffer("normed", hidden.columns, torch.bfloat16, is_replicated=True)
        struct = self._norm_struct(norm, hidden.columns)
        self._note(Code.NORM, hidden, output, partial(_same, struct))
        return output

    def _selected_rows(self, source: Buffer) -> Buffer:
        """Where all rows are selected this is `source`'s memory, and nothing is copied."""
        self._shapes.append(self._shapes[source.number])
        output = Buffer(len(self._shapes) - 1, source.columns)
        self._note(Code.SELECT, source, output, None)
        return output

    def _buffer(
        self, name: str, columns: int, dtype: torch.dtype, *, is_replicated: bool = False
    ) -> Buffer:
        """The buffer of that name; all layers use the same."""
        if (known := self._buffers.get(name)) is not None:
            if known.columns != columns:
                raise NotRecordable(f"its layers differ in the width of what is {name}")
            return known
        self._shapes.append(CBuffer(columns, dtype.itemsize, is_replicated))
        buffer = self._buffers[name] = Buffer(len(self._shapes) - 1, columns)
        return buffer

    def _pointer(self, tensor: Tensor | None) -> int | None:
        if tensor is not None:
            self._tensors.append(tensor)
        return pointer(tensor)

    # ------------------------------------------------------------------ parameters

    def _embedding(self) -> CEmbedding:
        embedded, multiplier = self._embedded, self._embedded.multiplier
        width = embedded.source.shape[1]
        factor = 1.0 if multiplier is None else float(multiplier)
        if self._tied_head is None:
            embedded.source = embedded.weight.contiguous()
            table = embedded.source
            return CEmbedding(width, 0, pointer(table), factor, len(table), table.nbytes)
        embedded.source = torch.empty(0)
        head = self._packed[id(self._tied_head)]
        return CEmbedding(width, 1, head.address, factor, head.rows, head.num_bytes)

    def _norm_struct(self, norm: Norm, width: int) -> CNorm:
        match norm:
            case RMSNorm():
                weight = self._pointer(norm.weight.contiguous())
                return CNorm(NormKind.RMS, width, norm.eps, weight, None, count_of(norm.weight), 0)
            case LayerNorm():
                weight, bias = self._pointer(norm.weight), self._pointer(norm.bias)
                counts = (count_of(norm.weight), count_of(norm.bias))
                return CNorm(NormKind.LAYER, width, norm.eps, weight, bias, *counts)
            case Rounding():
                return CNorm(NormKind.ROUND, width, 0.0, None, None)
            case _:
                raise NotRecordable(f"the norm {norm} has no op")

    def _attention(self, attention: SelfAttention) -> CAttention:
        spec = attention.spec
        kind, eps, weight = _qk_norm(attention.qk_norm)
        return CAttention(
            layer=spec.layer,
            num_heads=attention.num_heads,
            num_kv_heads=attention.num_kv_heads,
            head_dim=attention.head_dim,
            rotary_half=len(self._ropes[attention.rope].frequencies),
            window=spec.window or 0,
            qk_norm=kind,
            scale=spec.scale,
            softcap=spec.softcap or 0.0,
            eps=eps,
            qk_weight=self._pointer(weight),
            qk_count=count_of(weight),
        )

    # ------------------------------------------------------------------ the tape

    def tape(self, runtime: Runtime) -> Tape:
        """Pack the weights in the order of their use, and make the tape."""
        structs: dict[int, ctypes.Structure] = {}
        order = sorted(range(len(self._ops)), key=lambda i: self._ops[i].code is not Code.LINEAR)
        for index in order:
            if (make := self._ops[index].params) is not None:
                structs[index] = make()
        ops = (COp * len(self._ops))(
            *(
                COp(
                    code=op.code,
                    input=op.input,
                    output=op.output,
                    index=op.index,
                    epilogue=op.epilogue,
                    activation=op.activation,
                    selected=op.selected,
                    alpha=op.alpha,
                    bound=op.bound,
                    params=ctypes.addressof(structs[index]) if index in structs else None,
                )
                for index, op in enumerate(self._ops)
            )
        )
        buffers = (CBuffer * len(self._shapes))(*self._shapes)
        return Tape(
            runtime,
            ops,
            buffers,
            vocab_size=self._vocab_size,
            packer=self._packer,
            tensors=self._tensors,
            alive=(structs, self._packed, self._embedded),
        )


def record(decoder: Recordable, runtime: Runtime) -> Tape:
    """The tape of `decoder`, whose weights it takes. `NotRecordable` leaves them where they are."""
    recorder = Recorder(decoder, Packer(runtime.library))
    decoder.run(recorder)
    return recorder.tape(runtime)


def _same(struct: ctypes.Structure) -> ctypes.Structure:
    return struct


def _buffer_of(value: Value) -> Buffer:
    assert isinstance(value, Buffer)
    return value


def _activation(mlp: GatedMLP | MLP) -> Activation:
    for name, code in _ACTIVATIONS.items():
        if ACTIVATIONS[name] is mlp.activation:
            return code
    raise NotRecordable("its activation has no op")


def _qk_norm(norm: Norm) -> tuple[QKNorm, float, Tensor | None]:
    match norm:
        case FullNorm(of_query=RMSNorm() as of_query, of_key=RMSNorm() as of_key):
            weight = torch.cat((of_query.weight, of_key.weight)).contiguous()
            return QKNorm.ALL, of_query.eps, weight
        case RMSNorm():
            return QKNorm.HEADS, norm.eps, norm.weight.contiguous()
        case _ if norm is no_norm:
            return QKNorm.NONE, 0.0, None
        case _:
            raise NotRecordable(f"the norm {norm} of queries and keys has no op")
