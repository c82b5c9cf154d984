"""Sizes that do not fit their memory, given to the library; what it says to each."""

import ctypes
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
from tests.shard.backends.native.attention_steps import Case
from tests.shard.backends.native.programs import Program, Weights, prompt
from torch import Tensor

from kagami_shard.backends.native.library import (
    CAttention,
    CEmbedding,
    CLinear,
    CNorm,
    Code,
    COp,
    CQuantize,
    CRefusal,
    CRope,
    CRows,
    CSpan,
    Epilogue,
    Library,
    WeightKind,
    pointer,
    span_of,
)
from kagami_shard.backends.native.model import replay_into
from kagami_shard.backends.native.page_tables import PageTables
from kagami_shard.backends.native.recorder import record
from kagami_shard.backends.native.runtime import Runtime
from kagami_shard.forward.kv_cache import KVCache
from kagami_shard.layers.embedding import Head
from kagami_shard.layers.linear import Linear, QuantizedLinear
from kagami_shard.layers.mlp import ACTIVATIONS, GatedMLP
from kagami_shard.layers.norm import LayerNorm, RMSNorm, no_norm
from kagami_shard.quantization.int4 import quantize_int4
from kagami_shard.quantization.int8 import quantize_int8

ROWS, COLUMNS, GROUP = 48, 64, 32
Outcomes = dict[str, int]

# ---------------------------------------------------------------------- packing


def _bf16(library: Library, layer: CLinear, tensors: list[Tensor], **lies: int) -> int:
    part = CRows(pointer(tensors[0]), *tensors[0].shape, tensors[0].stride(0), tensors[0].nbytes)
    for name, value in lies.items():
        setattr(part, name, value)
    return cast(int, library.kg_pack(layer, ctypes.byref(part), 1, layer.rows % 4 == 2))


def _spans(tensors: list[Tensor], lies: Mapping[str, int]) -> list[CSpan]:
    spans = [span_of(tensor) for tensor in tensors]
    for name, value in lies.items():
        field, _, index = name.partition("_of_")
        setattr(spans[int(index)], field, value)
    return spans


def _by(name: str) -> Callable[..., int]:
    def pack(library: Library, layer: CLinear, tensors: list[Tensor], **lies: int) -> int:
        call: Callable[..., int] = getattr(library, name)
        return call(layer, *_spans(tensors, lies), 0)

    return pack


def _zeros(*shapes: tuple[int, int, torch.dtype]) -> list[Tensor]:
    return [torch.zeros(rows, columns, dtype=dtype) for rows, columns, dtype in shapes]


_GROUPS = COLUMNS // GROUP
PACKING: Mapping[WeightKind, tuple[Callable[..., int], list[Tensor]]] = {
    WeightKind.BF16: (_bf16, _zeros((ROWS, COLUMNS, torch.bfloat16))),
    WeightKind.INT8: (
        _by("kg_pack_int8"),
        _zeros((ROWS, COLUMNS, torch.int8), (ROWS, 1, torch.float32)),
    ),
    WeightKind.INT4: (
        _by("kg_pack_int4"),
        _zeros(
            (ROWS, COLUMNS // 2, torch.uint8),
            (ROWS, _GROUPS, torch.float16),
            (ROWS, _GROUPS, torch.float16),
        ),
    ),
    WeightKind.GROUPED8: (
        _by("kg_pack_bytes"),
        _zeros(
            (ROWS, COLUMNS, torch.uint8),
            (ROWS, _GROUPS, torch.float32),
            (ROWS, _GROUPS, torch.float32),
        ),
    ),
}
_LAYER_LIES: Mapping[str, tuple[int, ...]] = {
    "rows": (0, -1, ROWS + 1, 10 * ROWS, 5_000_000, 2**31 - 1),
    "columns": (0, -1, COLUMNS - 33, COLUMNS + 64, 5_000_000, 2**31 - 1),
    "weight_bytes": (0, -1, 64),
    "weight": (0,),
    "kind": (-1, 5, 99),
}
_ROWS_LIES: Mapping[str, tuple[int, ...]] = {
    "rows": (0, -1, ROWS - 1, ROWS + 1, 2**62),
    "columns": (0, COLUMNS - 1, COLUMNS + 1),
    "stride": (0, -64, COLUMNS - 1, COLUMNS + 1, 2**60),
    "bytes": (0, -1, ROWS * COLUMNS * 2 - 1),
    "first": (0,),
}


def mutated_packing(library: Library, kind: WeightKind) -> Outcomes:
    """What packing says: to sound sizes, and to each that lies."""
    pack, tensors = PACKING[kind]
    group = GROUP if kind in (WeightKind.INT4, WeightKind.GROUPED8) else 0
    layer = CLinear(kind=kind, rows=ROWS, columns=COLUMNS, group=group)
    room = torch.zeros(library.kg_packed_bytes(layer), dtype=torch.uint8)
    layer.weight, layer.weight_bytes = pointer(room), room.nbytes
    outcomes = {"sound": pack(library, layer, tensors)}
    layer_lies = {**_LAYER_LIES, **({"group": (0, -32, 33, 1)} if group else {})}
    for name, values in layer_lies.items():
        for value in values:
            lying = CLinear.from_buffer_copy(layer)
            setattr(lying, name, value)
            outcomes[f"{name} {value}"] = pack(library, lying, tensors)
    for name, values in _part_lies(kind, tensors):
        for value in values:
            outcomes[f"{name} {value}"] = pack(library, layer, tensors, **{name: value})
    return outcomes


def _part_lies(kind: WeightKind, tensors: list[Tensor]) -> Iterator[tuple[str, tuple[int, ...]]]:
    if kind is WeightKind.BF16:
        yield from _ROWS_LIES.items()
        return
    for index, tensor in enumerate(tensors):
        yield f"bytes_of_{index}", (0, -1, tensor.nbytes - 1, tensor.nbytes + 1, 2**60)
        yield f"data_of_{index}", (0,)


# ---------------------------------------------------------------------- tapes


class _Listening:
    """The library, which notes what tapes are made of."""

    def __init__(self, library: Library) -> None:
        self._library = library
        self.ops: ctypes.Array[COp]
        self.buffers: Any
        self.vocab_size = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._library, name)

    def kg_tape_new(self, pool: int, ops: Any, count: int, buffers: Any, *rest: Any) -> Any:
        self.ops, self.buffers, self.vocab_size = ops, buffers, rest[1]
        return self._library.kg_tape_new(pool, ops, count, buffers, *rest)


def _mlp(weights: Weights, make: Callable[[int, int], Any]) -> Program:
    first, second = (GatedMLP(make(96, 32), make(32, 48), ACTIVATIONS["silu"]) for _ in range(2))
    before = RMSNorm(weights.vector(32), 1e-5)
    after = LayerNorm(weights.vector(32), weights.vector(32), 1e-5)

    def body(ops: Any, hidden: Any) -> Any:
        hidden = ops.add(hidden, ops.mlp(ops.norm(hidden, before), first), after, 0.5)
        return ops.add(hidden, ops.mlp(ops.norm(hidden, before), second), no_norm, 1.0)

    return Program(weights, 32, body)


def _quantized(quantize: Callable[[Tensor], Any]) -> Callable[[Weights], Program]:
    def make(weights: Weights) -> Program:
        def linear(rows: int, columns: int) -> QuantizedLinear:
            return QuantizedLinear(quantize(weights.matrix(rows, columns).float()))

        return _mlp(weights, linear)

    return make


def _tied(weights: Weights) -> Program:
    program = Program(weights, 32, lambda ops, hidden: hidden)
    program._head = Head(Linear(program.embedding.weight), 64)
    return program


PROGRAMS: Mapping[str, Callable[[Weights], Program]] = {
    "mlp": lambda weights: _mlp(weights, weights.linear),
    "int8": _quantized(quantize_int8),
    "int4": _quantized(quantize_int4),
    "attention": lambda weights: Case().program(weights),
    "normed heads": lambda weights: Case(qk_norm="heads").program(weights),
    "tied": _tied,
}

_BIG = (2**30, 2**31 - 1)
# By code: the struct of its parameters, and of each field what it must not be, from what it is.
_Lies = Mapping[str, Callable[[int], tuple[int, ...]]]


def _other(value: int) -> tuple[int, ...]:
    return (value + 1, value - 1, 10 * value, 0, -1, *_BIG)


def _far(value: int) -> tuple[int, ...]:
    return (10 * value, 0, -1, *_BIG)


def _less(value: int) -> tuple[int, ...]:
    return (value // 3, 0, -1) if value else ()


def _more(value: int) -> tuple[int, ...]:
    return (10 * value + 64, *_BIG)


_HEADS: _Lies = {"num_heads": _other, "num_kv_heads": _other, "head_dim": _other}
_PARAMETERS: Mapping[Code, tuple[type[ctypes.Structure], _Lies]] = {
    Code.EMBED: (CEmbedding, {"width": _other, "rows": _more, "weight_bytes": _less}),
    Code.ROPE: (CRope, {"half": _other, "count": _less}),
    Code.NORM: (CNorm, {"width": _other, "weight_count": _less, "bias_count": _less}),
    Code.ADD_NORM: (CNorm, {"width": _other, "weight_count": _less, "bias_count": _less}),
    Code.LINEAR: (
        CLinear,
        # A few columns more are the same panel, where activations are padded too.
        {"rows": _other, "columns": _far, "weight_bytes": _less, "bias_count": _less},
    ),
    Code.WRITE: (CAttention, {**_HEADS, "rotary_half": _other, "qk_count": _less}),
    Code.ATTEND: (CAttention, _HEADS),
    Code.QUANTIZE: (CQuantize, {"columns": _other, "hadamard_block": lambda value: (0, -1, 3, 7)}),
}


def mutated_tapes(runtime: Runtime, kind: str) -> dict[str, str]:
    """Why the library makes no tape: of sound ops (empty), and of each with one lie."""
    listening = _Listening(runtime.library)
    quiet = Runtime(cast(Library, listening), 1, use_amx=False)
    tape = record(PROGRAMS[kind](Weights(0, torch.bfloat16)), quiet)
    ops, buffers, vocab_size = listening.ops, listening.buffers, listening.vocab_size

    def said(size: int = vocab_size) -> str:
        refusal = CRefusal()
        made = runtime.library.kg_tape_new(
            quiet.pool, ops, len(ops), buffers, len(buffers), size, ctypes.byref(refusal)
        )
        if made:
            runtime.library.kg_tape_delete(made)
            return ""
        return (refusal.reason or b"").decode()

    outcomes = {"sound": said()}
    for size in (vocab_size + 1, vocab_size - 1, 0, -1, 2**40):
        outcomes[f"vocabulary of {size}"] = said(size)
    for name, struct, field, value in _lies(ops, buffers):
        honest = getattr(struct, field)
        setattr(struct, field, value)
        outcomes[f"{name}.{field} {honest} -> {value}"] = said()
        setattr(struct, field, honest)
    del tape
    return outcomes


def _lies(ops: Any, buffers: Any) -> Iterator[tuple[str, ctypes.Structure, str, Any]]:
    for index, op in enumerate(ops):
        name = f"op {index} {Code(op.code).name}"
        yield from ((name, op, "code", value) for value in (-1, 99))
        yield name, op, "selected", 1 - op.selected
        if op.code not in (Code.EMBED, Code.ROPE):
            yield from ((name, op, "input", value) for value in (-1, len(buffers), 2**31 - 1))
        yield from ((name, op, "output", value) for value in (-2, len(buffers), 2**31 - 1))
        if op.code == Code.WRITE:
            yield from ((name, op, "index", value) for value in (-1, len(buffers), op.input))
        if op.code == Code.LINEAR:
            yield from ((name, op, "epilogue", value) for value in (-1, 4, _other_kind(op)))
        if op.code in _PARAMETERS:
            kind, lies = _PARAMETERS[Code(op.code)]
            struct = kind.from_address(op.params)
            for field, values in lies.items():
                yield from ((name, struct, field, each) for each in values(getattr(struct, field)))
            yield name, op, "params", None
    for index, buffer in enumerate(buffers):
        for value in (buffer.columns + 1, buffer.columns - 1, 0, -1, 2**31 - 1):
            yield f"buffer {index}", buffer, "columns", value
        for value in (0, -1, 3, 8):
            yield f"buffer {index}", buffer, "item_size", value


def _other_kind(op: COp) -> Epilogue:
    is_float = op.epilogue in (Epilogue.STORE_FLOAT, Epilogue.ADD)
    return Epilogue.STORE_BF16 if is_float else Epilogue.STORE_FLOAT


def outside_the_vocabulary(runtime: Runtime, token: int) -> None:
    """A step of a token that the embedding does not have."""
    program = Case().program(Weights(0, torch.bfloat16))
    tape = record(program, runtime)
    batch = prompt(5)
    batch.input_ids[3] = token
    cache = KVCache([program.heads], 8, 4, dtype=torch.bfloat16, device=torch.device("cpu"))
    replay_into(tape, batch, PageTables(cache), torch.empty(5, 160))
