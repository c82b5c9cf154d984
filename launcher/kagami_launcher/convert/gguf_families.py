"""The model half of a GGUF file: config.json and tensor names, by architecture.

llama.cpp keeps its own names for everything, the same for all architectures; a family says which
checkpoint's names they become and what llama.cpp did to the weights. The table holds what a test
compares with transformers' own reader; another architecture is refused, not guessed.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from gguf import quants

from kagami_launcher.convert.files import ConversionRefused, shown
from kagami_launcher.convert.gguf_file import GgufTensor
from kagami_launcher.convert.gguf_tokenizer import Metadata

_Tensors = Mapping[str, GgufTensor]
_LAYER = re.compile(r"0|[1-9][0-9]{0,5}")


@dataclass(frozen=True, slots=True)
class GgufFamily:
    """How one architecture of llama.cpp's is written as a checkpoint."""

    model_type: str
    architecture: str
    block_names: Mapping[str, str]
    settings: Callable[[Metadata, _Tensors], dict[str, Any]]
    swaps_rotary_rows: bool = False  # rows of q and k lie in the order that rotates neighbours
    adds_one_to_norms: bool = False  # the checkpoint's norms are centered at zero


_LLAMA_NAMES = MappingProxyType(
    {
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
)
_TOP_NAMES: Mapping[str, str] = MappingProxyType(
    {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
)


def _llama(metadata: Metadata, tensors: _Tensors) -> dict[str, Any]:
    return {"attention_bias": "blk.0.attn_q.bias" in tensors, "mlp_bias": False}


def _qwen2(metadata: Metadata, tensors: _Tensors) -> dict[str, Any]:
    return {"use_sliding_window": False}


def _qwen3(metadata: Metadata, tensors: _Tensors) -> dict[str, Any]:
    return {"use_sliding_window": False, "attention_bias": "blk.0.attn_q.bias" in tensors}


def _phi3(metadata: Metadata, tensors: _Tensors) -> dict[str, Any]:
    return {"sliding_window": metadata.count("attention.sliding_window", 0, least=0) or None}


def _gemma2(metadata: Metadata, tensors: _Tensors) -> dict[str, Any]:
    heads, hidden = metadata.count("attention.head_count"), metadata.count("embedding_length")
    # Not in the file. Only the 27B model (46 layers) scales by hidden size / heads.
    is_27b = metadata.count("block_count") == 46
    scalar = hidden // heads if is_27b else _head_dim(metadata)
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": scalar,
        "attn_logit_softcapping": metadata.real("attn_logit_softcapping", 50.0),
        "final_logit_softcapping": metadata.real("final_logit_softcapping", 30.0),
        "sliding_window": metadata.count("attention.sliding_window"),
        "attention_bias": False,
    }


_BLOCK_NORMS = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)

# general.architecture -> its family.
FAMILIES: Mapping[str, GgufFamily] = MappingProxyType(
    {
        "llama": GgufFamily(
            "llama", "LlamaForCausalLM", _LLAMA_NAMES, _llama, swaps_rotary_rows=True
        ),
        "qwen2": GgufFamily("qwen2", "Qwen2ForCausalLM", _LLAMA_NAMES, _qwen2),
        "qwen3": GgufFamily(
            "qwen3",
            "Qwen3ForCausalLM",
            {**_LLAMA_NAMES, "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"},
            _qwen3,
        ),
        "phi3": GgufFamily(
            "phi3",
            "Phi3ForCausalLM",
            {**_LLAMA_NAMES, "attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"},
            _phi3,
        ),
        "gemma2": GgufFamily(
            "gemma2",
            "Gemma2ForCausalLM",
            {
                **_LLAMA_NAMES,
                "post_attention_norm": "post_attention_layernorm",
                "ffn_norm": "pre_feedforward_layernorm",
                "post_ffw_norm": "post_feedforward_layernorm",
            },
            _gemma2,
            adds_one_to_norms=True,
        ),
    }
)


def family_of(metadata: Metadata) -> GgufFamily:
    """The family of a file; refuses what is not in the table."""
    family = FAMILIES.get(metadata.architecture)
    if family is None or metadata.count("expert_count", 0, least=0):
        kind = "with experts " if metadata.count("expert_count", 0, least=0) else ""
        raise ConversionRefused(
            f"GGUF architecture {shown(metadata.architecture)} {kind}is not supported yet, only "
            f"{', '.join(FAMILIES)}"
        )
    return family


def checkpoint_name(name: str, family: GgufFamily) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`."""
    match name.split("."):
        case ["blk", layer, part, suffix] if part in family.block_names and _LAYER.fullmatch(layer):
            return f"model.layers.{layer}.{family.block_names[part]}.{suffix}"
        case [part, suffix] if part in _TOP_NAMES:
            return f"{_TOP_NAMES[part]}.{suffix}"
    raise ConversionRefused(f"tensor {shown(name)} has no place in a {family.model_type} model")


def _shortest_float(value: float) -> float:
    """GGUF stores 32-bit floats: 9.999999747e-06 was written as 1e-05."""
    return float(str(np.float32(value)))


def _head_dim(metadata: Metadata) -> int:
    heads, hidden = metadata.count("attention.head_count"), metadata.count("embedding_length")
    found = metadata.count("attention.key_length", 0, least=0) or hidden // heads
    if not found:
        raise ConversionRefused(
            f"`embedding_length` is {hidden}, too small for `attention.head_count` {heads}"
        )
    return found


def model_config(metadata: Metadata, tensors: _Tensors, family: GgufFamily) -> dict[str, Any]:
    """config.json, with the names a checkpoint uses."""
    heads, hidden = metadata.count("attention.head_count"), metadata.count("embedding_length")
    head_dim = _head_dim(metadata)
    rotated = metadata.count("rope.dimension_count", head_dim)
    if rotated != head_dim:
        raise ConversionRefused(
            f"only {rotated} of {head_dim} dimensions of a head are rotated: "
            f"`rope.dimension_count` is {rotated}, `embedding_length` {hidden} and "
            f"`attention.head_count` {heads}"
        )
    theta = _shortest_float(metadata.real("rope.freq_base", 10000.0))
    return {
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": metadata.count("feed_forward_length"),
        "num_hidden_layers": metadata.count("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.count("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": metadata.count("context_length"),
        "rms_norm_eps": _shortest_float(metadata.real("attention.layer_norm_rms_epsilon", 1e-5)),
        "rope_theta": theta,
        "rope_scaling": rope_scaling(metadata, tensors.get("rope_freqs.weight"), theta, head_dim),
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "tie_word_embeddings": "output.weight" not in tensors,
        "bos_token_id": metadata.token_id("bos"),
        "eos_token_id": metadata.token_id("eos"),
        "pad_token_id": metadata.token_id("padding"),
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
        **family.settings(metadata, tensors),
    }


# Llama 3.1's and 3.2's own values; the factor is read from the file.
_LLAMA3_SCALING: Mapping[str, Any] = MappingProxyType(
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
)


def rope_scaling(
    metadata: Metadata, factors: GgufTensor | None, theta: float, head_dim: int
) -> dict[str, Any] | None:
    """`rope_scaling` of config.json; `factors` is the tensor that Llama 3's scaling becomes."""
    kind = metadata.kind("rope.scaling.type", "none")
    if factors is not None:
        return _llama3_scaling(factors, theta, head_dim)
    if kind == "linear":
        return {
            "rope_type": "linear",
            "factor": _shortest_float(metadata.real("rope.scaling.factor", 1.0)),
        }
    if kind != "none":
        raise ConversionRefused(f"rope scaling {shown(kind)} is not supported yet")
    return None


def _llama3_scaling(factors: GgufTensor, theta: float, head_dim: int) -> dict[str, Any]:
    if factors.shape != (head_dim // 2,):
        raise ConversionRefused(
            f"tensor `rope_freqs.weight` has shape {list(factors.shape)}, expected "
            f"{[head_dim // 2]} for heads of {head_dim}"
        )
    found = dict(_LLAMA3_SCALING)
    stored = dequantized(factors).reshape(-1)
    found["factor"] = _shortest_float(float(stored.max()))
    if not np.allclose(stored, llama3_factors(found, theta, head_dim), rtol=1e-3):
        raise ConversionRefused("`rope_freqs.weight` is not the scaling of Llama 3")
    return found


def dequantized(tensor: GgufTensor) -> Any:
    """Its numbers in float32 or float16; refuses a type that the gguf package cannot read."""
    try:
        with np.errstate(invalid="ignore", over="ignore"):  # the shard finds what is not finite
            return quants.dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError as error:
        raise ConversionRefused(
            f"tensor {shown(tensor.name)} has type {tensor.tensor_type.name}"
        ) from error


def llama3_factors(scaling: Mapping[str, Any], theta: float, head_dim: int) -> Any:
    """What llama.cpp stores for this scaling: a divisor for each frequency, `[head_dim / 2]`."""
    frequencies = theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    wavelengths = 2 * np.pi / frequencies
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] / wavelengths
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return 1 / ((1 - smooth) / scaling["factor"] + smooth)


def check_shapes(tensors: _Tensors, config: Mapping[str, Any], family: GgufFamily) -> None:
    """Refuse a file whose tensors and whose numbers of the model contradict each other."""
    layers = {name.split(".")[1] for name in tensors if name.startswith("blk.")}
    num_layers = config["num_hidden_layers"]
    if len(layers) != num_layers or any(int(layer) >= num_layers for layer in layers):
        raise ConversionRefused(
            f"`block_count` is {num_layers}, and the file has the tensors of {len(layers)} blocks"
        )
    expected = _shapes(config)
    for name, tensor in tensors.items():
        part, _, suffix = checkpoint_name(name, family).rpartition(".")
        shape = expected.get((part.rpartition(".")[2], suffix))
        if tensor.shape != shape:
            wanted = "none" if shape is None else list(shape)
            raise ConversionRefused(
                f"tensor {shown(name)} has shape {list(tensor.shape)}, expected {wanted} by the "
                "sizes that the file says"
            )


def _shapes(config: Mapping[str, Any]) -> Mapping[tuple[str, str], tuple[int, ...]]:
    """The last two parts of a checkpoint's names -> the shape that a model of these sizes has."""
    hidden, inner, vocab = (
        config[name] for name in ("hidden_size", "intermediate_size", "vocab_size")
    )
    head_dim = config["head_dim"]
    queries = config["num_attention_heads"] * head_dim
    keys = config["num_key_value_heads"] * head_dim
    outputs = {
        "q_proj": queries,
        "k_proj": keys,
        "v_proj": keys,
        "qkv_proj": queries + 2 * keys,
        "o_proj": hidden,
        "gate_proj": inner,
        "up_proj": inner,
        "gate_up_proj": 2 * inner,
        "down_proj": hidden,
    }
    inputs = {"o_proj": queries, "down_proj": inner}
    norms = ("norm", *_BLOCK_NORMS)
    return {
        **{(name, "weight"): (rows, inputs.get(name, hidden)) for name, rows in outputs.items()},
        **{(name, "bias"): (rows,) for name, rows in outputs.items()},
        **{(name, "weight"): (vocab, hidden) for name in ("embed_tokens", "lm_head")},
        **{(name, "weight"): (hidden,) for name in norms},
        **{(name, "weight"): (head_dim,) for name in ("q_norm", "k_norm")},
    }
