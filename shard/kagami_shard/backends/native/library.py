"""ops.h in Python: the library's structs and functions, through ctypes.

A plain C interface needs no header of torch or Python: the library builds in 5 s instead of 40,
with any compiler, and one build serves every version of both (notes/0008). A library whose structs
or numbers are not those of this file is refused when it is loaded.
"""

import ctypes
from collections.abc import Mapping
from ctypes import POINTER, c_char_p, c_float, c_int, c_int32, c_int64, c_void_p
from enum import IntEnum
from itertools import zip_longest
from pathlib import Path
from types import MappingProxyType

from torch import Tensor


class WeightKind(IntEnum):
    """The form of a packed weight."""

    BF16 = 0
    INT8 = 1
    INT4 = 2
    FLOAT8 = 3
    GROUPED8 = 4


class Code(IntEnum):
    """What an op does."""

    EMBED = 0
    ROPE = 1
    NORM = 2
    ADD_NORM = 3
    LINEAR = 4
    WRITE = 5
    ATTEND = 6
    QUANTIZE = 7
    SELECT = 8


class Epilogue(IntEnum):
    """What becomes of a linear layer's sums."""

    STORE_FLOAT = 0
    STORE_BF16 = 1
    ADD = 2
    GATED = 3


class Activation(IntEnum):
    """What a linear layer does to its output."""

    NONE = 0
    SILU = 1
    GELU = 2
    GELU_TANH = 3
    RELU = 4
    SOFTCAP = 5


class NormKind(IntEnum):
    """The formula of an op's norm; `ROUND` only rounds."""

    ROUND = 0
    RMS = 1
    LAYER = 2


class QKNorm(IntEnum):
    """The norm of queries and keys: none, of each head, or of all heads together."""

    NONE = 0
    HEADS = 1
    ALL = 2


SCRATCH_BYTES = 3 << 17
"""Of each thread"""
LOGITS = -1
"""The number of a buffer that is not the tape's: the logits of the step"""


class CSpan(ctypes.Structure):
    _fields_ = (("data", c_void_p), ("bytes", c_int64))


class CRows(ctypes.Structure):
    _fields_ = (
        ("first", c_void_p),
        ("rows", c_int64),
        ("columns", c_int64),
        ("stride", c_int64),
        ("bytes", c_int64),
    )


class CRefusal(ctypes.Structure):
    _fields_ = (("op", c_int32), ("reason", c_char_p))


class CLinear(ctypes.Structure):
    _fields_ = (
        ("kind", c_int32),
        ("rows", c_int32),
        ("columns", c_int32),
        ("group", c_int32),
        ("weight", c_void_p),
        ("bias", c_void_p),
        ("weight_bytes", c_int64),
        ("bias_count", c_int64),
    )


class CQuantize(ctypes.Structure):
    _fields_ = (("columns", c_int32), ("hadamard_block", c_int32))


class CEmbedding(ctypes.Structure):
    _fields_ = (
        ("width", c_int32),
        ("is_packed", c_int32),
        ("weight", c_void_p),
        ("multiplier", c_float),
        ("rows", c_int32),
        ("weight_bytes", c_int64),
    )


class CRope(ctypes.Structure):
    _fields_ = (
        ("half", c_int32),
        ("factor", c_float),
        ("frequencies", c_void_p),
        ("count", c_int64),
    )


class CNorm(ctypes.Structure):
    _fields_ = (
        ("kind", c_int32),
        ("width", c_int32),
        ("eps", c_float),
        ("weight", c_void_p),
        ("bias", c_void_p),
        ("weight_count", c_int64),
        ("bias_count", c_int64),
    )


class CAttention(ctypes.Structure):
    _fields_ = (
        ("layer", c_int32),
        ("num_heads", c_int32),
        ("num_kv_heads", c_int32),
        ("head_dim", c_int32),
        ("rotary_half", c_int32),
        ("window", c_int32),
        ("qk_norm", c_int32),
        ("scale", c_float),
        ("softcap", c_float),
        ("eps", c_float),
        ("qk_weight", c_void_p),
        ("qk_count", c_int64),
    )


class COp(ctypes.Structure):
    _fields_ = (
        ("code", c_int32),
        ("input", c_int32),
        ("output", c_int32),
        ("index", c_int32),
        ("epilogue", c_int32),
        ("activation", c_int32),
        ("selected", c_int32),
        ("alpha", c_float),
        ("bound", c_float),
        ("params", c_void_p),
    )


class CBuffer(ctypes.Structure):
    _fields_ = (
        ("columns", c_int32),
        ("item_size", c_int32),
        ("is_replicated", c_int32),
    )


class CBatch(ctypes.Structure):
    _fields_ = (
        ("num_tokens", c_int64),
        ("num_sequences", c_int64),
        ("num_decodes", c_int64),
        ("table_width", c_int64),
        ("input_ids", c_void_p),
        ("positions", c_void_p),
        ("block_tables", c_void_p),
        ("query_lens", c_void_p),
        ("kv_lens", c_void_p),
        ("keys", c_void_p),
        ("values", c_void_p),
        ("block_size", c_int64),
        ("logits", c_void_p),
        ("selected", c_void_p),
        ("rows", c_void_p),
    )


class CDecodes(ctypes.Structure):
    _fields_ = (
        ("batch", CBatch),
        ("ids", c_void_p),
        ("positions", c_void_p),
        ("kv_lens", c_void_p),
        ("logprobs", c_void_p),
        ("vocab_size", c_int64),
        ("sampling_ns", c_int64),
    )


_STRUCTS: Mapping[str, type[ctypes.Structure]] = MappingProxyType(
    {
        "kg_span": CSpan,
        "kg_rows": CRows,
        "kg_refusal": CRefusal,
        "kg_linear": CLinear,
        "kg_quantize": CQuantize,
        "kg_embedding": CEmbedding,
        "kg_rope": CRope,
        "kg_norm": CNorm,
        "kg_attention": CAttention,
        "kg_op": COp,
        "kg_buffer": CBuffer,
        "kg_batch": CBatch,
        "kg_decodes": CDecodes,
    }
)
_ENUMS: Mapping[str, type[IntEnum]] = MappingProxyType(
    {
        "kind": WeightKind,
        "code": Code,
        "epilogue": Epilogue,
        "activation": Activation,
        "norm kind": NormKind,
        "qk norm": QKNorm,
    }
)
_SIGNATURES: dict[str, tuple[object, tuple[object, ...]]] = {
    "kg_layout": (c_char_p, ()),
    "kg_has_amx": (c_int, ()),
    "kg_pool_new": (c_void_p, (c_int, c_int, c_int)),
    "kg_pool_delete": (None, (c_void_p,)),
    "kg_packed_bytes": (c_int64, (POINTER(CLinear),)),
    "kg_pack_int8": (c_int, (POINTER(CLinear), POINTER(CSpan), POINTER(CSpan), c_int)),
    "kg_pack_int4": (
        c_int,
        (POINTER(CLinear), POINTER(CSpan), POINTER(CSpan), POINTER(CSpan), c_int),
    ),
    "kg_pack_bytes": (
        c_int,
        (POINTER(CLinear), POINTER(CSpan), POINTER(CSpan), POINTER(CSpan), c_int),
    ),
    "kg_pack": (c_int, (POINTER(CLinear), POINTER(CRows), c_int, c_int)),
    "kg_padded_rows": (c_int64, (c_int64, c_int)),
    "kg_arrange": (None, (c_void_p, c_void_p, c_int64, c_int64, c_int64, c_int64)),
    "kg_huge_alloc": (c_void_p, (c_int64,)),
    "kg_huge_free": (None, (c_void_p, c_int64)),
    "kg_tape_new": (
        c_void_p,
        (c_void_p, POINTER(COp), c_int, POINTER(CBuffer), c_int, c_int64, POINTER(CRefusal)),
    ),
    "kg_tape_delete": (None, (c_void_p,)),
    "kg_replay": (c_int, (c_void_p, POINTER(CBatch))),
    "kg_decode": (c_int, (c_void_p, POINTER(CDecodes))),
    "kg_tape_buffer": (c_void_p, (c_void_p, c_int, POINTER(c_int64))),
    "kg_choose_tokens": (None, (c_void_p, c_void_p, c_int64, c_int64, c_void_p, c_void_p)),
    "kg_logprobs": (
        None,
        (c_void_p, c_void_p, c_int64, c_int64, c_void_p, c_int64, c_void_p),
    ),
}


class LayoutDiffers(OSError):
    """The library's structs or numbers are not those of this file."""


class Library(ctypes.CDLL):
    """The loaded library; every call lets other Python threads run."""

    def __init__(self, path: Path) -> None:
        """Raises OSError, `LayoutDiffers` of them."""
        super().__init__(str(path))
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(self, name)
            function.restype, function.argtypes = result, arguments
        compare_layout(self.kg_layout().decode())


def compare_layout(theirs: str) -> None:
    """Of the library, as `kg_layout` says it. Raises `LayoutDiffers`."""
    for ours, line in zip_longest(layout().splitlines(), theirs.splitlines(), fillvalue="nothing"):
        if ours != line:
            raise LayoutDiffers(f"its layout is another: {line} in place of {ours}")


def layout() -> str:
    """What this file says, in the words of `kg_layout`."""
    structs = [
        (name, [ctypes.sizeof(kind), *(getattr(kind, field[0]).offset for field in kind._fields_)])
        for name, kind in _STRUCTS.items()
    ]
    enums = [(name, [int(member) for member in kind]) for name, kind in _ENUMS.items()]
    lines = [*structs, *enums, ("logits", [LOGITS]), ("scratch bytes", [SCRATCH_BYTES])]
    return "".join(f"{name} {' '.join(map(str, numbers))}\n" for name, numbers in lines)


def pointer(tensor: Tensor | None) -> int | None:
    """The address of a contiguous tensor's first element; who stores it must hold the tensor."""
    if tensor is None:
        return None
    assert tensor.is_contiguous()
    return tensor.data_ptr()


def count_of(tensor: Tensor | None) -> int:
    """Its values; None has none."""
    return 0 if tensor is None else tensor.numel()


def span_of(tensor: Tensor | None) -> CSpan:
    """The memory of a contiguous tensor; who stores it must hold the tensor."""
    return CSpan(pointer(tensor), 0 if tensor is None else tensor.nbytes)
