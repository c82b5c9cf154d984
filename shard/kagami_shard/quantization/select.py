"""config.json's quantization_config and --quantize -> the scheme that a model is loaded with."""

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from kagami_proto.errors import UnsupportedModel
from kagami_shard.quantization.awq import AWQFormat
from kagami_shard.quantization.compressed_tensors import CompressedTensorsFormat
from kagami_shard.quantization.fp8 import quantize_fp8
from kagami_shard.quantization.fp8_checkpoint import Fp8Format
from kagami_shard.quantization.gptq import GPTQFormat
from kagami_shard.quantization.int4 import quantize_int4
from kagami_shard.quantization.int8 import quantize_int8
from kagami_shard.quantization.source import Format, Scheme
from kagami_shard.weights.json_files import shown

Config = Mapping[str, Any]

_LARGEST_GROUP = 1 << 20

_INT8 = Scheme("int8", quantize=quantize_int8, quantize_head=quantize_int8)
_INT4 = Scheme("int4", quantize=quantize_int4, quantize_head=quantize_int8)

# --quantize for checkpoints in full precision; the launcher's help says the same.
AT_LOAD: Mapping[str, Scheme] = MappingProxyType(
    {
        "int8": _INT8,
        "eetq": _INT8,
        "bitsandbytes": _INT8,
        "int4": _INT4,
        "bitsandbytes-nf4": _INT4,
        "bitsandbytes-fp4": _INT4,
        "fp8": Scheme("fp8", quantize=quantize_fp8),
    }
)


def select_scheme(config: Config | None, quantize: str | None) -> Scheme:
    """`config` is the model's quantization_config. Raises `UnsupportedModel`.

    A checkpoint that is quantized is read as it is; `quantize` may then only say the same.
    """
    if not config:
        return _at_load(quantize)
    method = str(config.get("quant_method") or "").replace("_", "-")
    if (entry := _METHODS.get(method)) is None:
        raise UnsupportedModel(
            f"weights quantized by {method or 'an unnamed method'} are not read: quant_method is "
            f"none of {', '.join(_METHODS)}"
        )
    flag, read_config = entry
    if quantize not in (None, flag):
        raise UnsupportedModel(
            f"--quantize {quantize}: the weights are quantized already ({method}): start it "
            "without --quantize"
        )
    format = read_config(config)
    return Scheme(format.name, format)


def _at_load(quantize: str | None) -> Scheme:
    if quantize is None:
        return Scheme()
    if (scheme := AT_LOAD.get(quantize)) is None:
        raise UnsupportedModel(
            f"--quantize {quantize}: the weights are not quantized so; --quantize int8 or int4 "
            "quantizes them as they are loaded"
        )
    return scheme


def _gptq(config: Config) -> Format:
    bits = config.get("bits")
    if bits not in (4, 8):
        raise _refused("gptq", "bits", bits, "4 or 8")
    layout = config.get("checkpoint_format") or "gptq"
    if layout not in ("gptq", "gptq_v2"):
        raise _refused("gptq", "checkpoint_format", layout, "gptq or gptq_v2")
    return GPTQFormat(bits, _group_size(config), zeros_less_one=layout == "gptq")


def _awq(config: Config) -> Format:
    bits = config.get("bits", config.get("w_bit"))
    if bits != 4:
        raise _refused("awq", "bits", bits, "4")
    layout = str(config.get("version") or "gemm").lower()
    if layout != "gemm":
        raise _refused("awq", "version", layout, "gemm")
    return AWQFormat(_group_size(config))


def _fp8(config: Config) -> Format:
    block = config.get("weight_block_size")
    return Fp8Format(None if block is None else _block(block))


def _compressed_tensors(config: Config) -> Format:
    sparsity = (config.get("sparsity_config") or {}).get("format", "dense")
    if sparsity != "dense":
        raise _refused("compressed-tensors", "sparsity_config.format", sparsity, "dense")
    groups = list((config.get("config_groups") or {}).values())
    for group in groups:
        weights = group.get("weights") or {}
        if (kind := (weights.get("type", "int"), weights.get("num_bits", 8))) not in _KINDS:
            known = ", ".join(f"{name} of {bits} bits" for name, bits in _KINDS)
            raise _refused("compressed-tensors", "weights", f"{kind[0]} of {kind[1]} bits", known)
    blocks = {tuple((group.get("weights") or {}).get("block_structure") or ()) for group in groups}
    blocks -= {()}
    if len(blocks) > 1:
        raise _refused("compressed-tensors", "block_structure", sorted(blocks), "one for all")
    block = next(iter(blocks), None)
    return CompressedTensorsFormat(
        int8_activations=any(group.get("input_activations") for group in groups),
        block=None if block is None else _block(block),
    )


def _block(block: Sequence[Any]) -> tuple[int, int]:
    if len(block) != 2 or not all(map(_is_size, block)):
        raise UnsupportedModel(f"quantization_config: a block of {shown(block)} is no size")
    return int(block[0]), int(block[1])


_KINDS = (("int", 4), ("int", 8), ("float", 8))


def _group_size(config: Config) -> int:
    size = config.get("group_size", config.get("q_group_size", -1))
    if size is None or size == -1:
        return -1
    if not _is_size(size):
        raise UnsupportedModel(f"quantization_config: group_size {shown(size)} is no size")
    return int(size)


def _is_size(value: object) -> bool:
    """Whether so many columns, or rows, can share a scale."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= _LARGEST_GROUP


def _refused(method: str, field: str, value: object, known: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"weights quantized by {method}: {field} {value!r} is not read, only {known}"
    )


# quant_method -> the value of --quantize that means the same, and what reads the rest.
_METHODS: Mapping[str, tuple[str, Callable[[Config], Format]]] = MappingProxyType(
    {
        "gptq": ("gptq", _gptq),
        "awq": ("awq", _awq),
        "fp8": ("fp8", _fp8),
        "fbgemm-fp8": ("fp8", _fp8),
        "compressed-tensors": ("compressed-tensors", _compressed_tensors),
    }
)
