"""GGUF file -> Hugging Face folder.

Knows llama.cpp's names and layouts and turns them back into a checkpoint's: config.json,
generation_config.json, tokenizer.json, tokenizer_config.json, chat_template.jinja and one
model.safetensors in bfloat16. Tensor by tensor and with numpy alone: neither torch nor a whole
model is ever in memory.
"""

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import MappingProxyType
from typing import Any

import gguf
import numpy as np
from gguf import quants

from kagami_launcher.convert_files import (
    ConversionRefused,
    StoredTensor,
    write_json,
    write_safetensors,
)
from kagami_launcher.convert_gguf_tokenizer import (
    Metadata,
    build_tokenizer,
    generation_config,
    tokenizer_config,
)

log = logging.getLogger(__name__)


def _plain_float(value: float) -> float:
    """GGUF stores 32-bit floats: 9.999999747e-06 was written as 1e-05."""
    return float(str(np.float32(value)))


def model_config(metadata: Metadata, tensors: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of a Llama model, with the names a checkpoint uses."""
    heads, hidden = metadata.need("attention.head_count"), metadata.need("embedding_length")
    head_dim = metadata.of_model("attention.key_length") or hidden // heads
    rotated = metadata.of_model("rope.dimension_count", head_dim)
    if rotated != head_dim:
        raise ConversionRefused(f"only {rotated} of {head_dim} dimensions of a head are rotated")
    theta = _plain_float(metadata.of_model("rope.freq_base", 10000.0))
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": metadata.need("feed_forward_length"),
        "num_hidden_layers": metadata.need("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.of_model("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": metadata.need("context_length"),
        "rms_norm_eps": _plain_float(metadata.of_model("attention.layer_norm_rms_epsilon", 1e-5)),
        "rope_theta": theta,
        "rope_scaling": rope_scaling(metadata, tensors.get("rope_freqs.weight"), theta, head_dim),
        "vocab_size": int(tensors["token_embd.weight"].shape[1]),
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": False,
        "bos_token_id": metadata.token_id("bos"),
        "eos_token_id": metadata.token_id("eos"),
        "pad_token_id": metadata.token_id("padding"),
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
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
    metadata: Metadata, factors: Any, theta: float, head_dim: int
) -> dict[str, Any] | None:
    """`rope_scaling` of config.json; `factors` is the tensor that Llama 3's scaling becomes."""
    kind = metadata.of_model("rope.scaling.type", "none")
    if factors is not None:
        found = dict(_LLAMA3_SCALING)
        stored = quants.dequantize(factors.data, factors.tensor_type).reshape(-1)
        found["factor"] = _plain_float(float(stored.max()))
        expected = llama3_factors(found, theta, head_dim)
        if stored.shape != expected.shape or not np.allclose(stored, expected, rtol=1e-3):
            raise ConversionRefused("`rope_freqs.weight` is not the scaling of Llama 3")
        return found
    if kind == "linear":
        return {
            "rope_type": "linear",
            "factor": _plain_float(metadata.of_model("rope.scaling.factor", 1.0)),
        }
    if kind != "none":
        raise ConversionRefused(f"rope scaling `{kind}` is not supported yet")
    return None


def llama3_factors(scaling: Mapping[str, Any], theta: float, head_dim: int) -> Any:
    """What llama.cpp stores for this scaling: a divisor for each frequency, `[head_dim / 2]`."""
    frequencies = theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    wavelengths = 2 * np.pi / frequencies
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] / wavelengths
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return 1 / ((1 - smooth) / scaling["factor"] + smooth)


# --- tokenizer ------------------------------------------------------------------------------------

_BLOCK_NAMES = MappingProxyType(
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
_TOP_NAMES = MappingProxyType(
    {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
)


def checkpoint_name(name: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`."""
    match name.split("."):
        case ["blk", layer, part, suffix] if part in _BLOCK_NAMES:
            return f"model.layers.{layer}.{_BLOCK_NAMES[part]}.{suffix}"
        case [part, suffix] if part in _TOP_NAMES:
            return f"{_TOP_NAMES[part]}.{suffix}"
    raise ConversionRefused(f"tensor `{name}` has no place in a Llama model")


def unpermute(weight: Any, num_heads: int) -> Any:
    """Undo llama.cpp's order of q and k rows: it rotates neighbours, a checkpoint halves."""
    half = weight.shape[0] // num_heads // 2
    pairs = weight.reshape(num_heads, half, 2, *weight.shape[1:])
    return pairs.swapaxes(1, 2).reshape(weight.shape)


@dataclass(frozen=True, slots=True)
class _Placed:
    """A source tensor with its name in the checkpoint."""

    name: str
    source: Any

    @property
    def shape(self) -> list[int]:
        return [int(size) for size in reversed(self.source.shape)]  # GGUF lists the fastest first

    @property
    def num_bytes(self) -> int:
        return 2 * int(np.prod(self.shape))

    def stored(self, config: Mapping[str, Any]) -> StoredTensor:
        return StoredTensor(
            self.name, "BF16", self.shape, self.num_bytes, lambda: self.to_bfloat16(config).data
        )

    def to_bfloat16(self, config: Mapping[str, Any]) -> Any:
        weight = quants.dequantize(self.source.data, self.source.tensor_type).reshape(self.shape)
        if ".q_proj." in self.name:
            weight = unpermute(weight, config["num_attention_heads"])
        elif ".k_proj." in self.name:
            weight = unpermute(weight, config["num_key_value_heads"])
        bits = np.ascontiguousarray(weight, dtype=np.float32).view(np.uint32)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16  # to nearest, ties to even
        return rounded.astype("<u2")


def write_weights(path: Path, tensors: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Write all tensors as one safetensors file; only one is in memory at a time."""
    placed = [
        _Placed(checkpoint_name(name), tensor)
        for name, tensor in tensors.items()
        if name != "rope_freqs.weight"
    ]
    write_safetensors(path, [item.stored(config) for item in placed])


def write_folder(source: Path, folder: Path) -> None:
    """Fill `folder` with the checkpoint that the GGUF file `source` holds."""
    started = time.monotonic()
    reader = gguf.GGUFReader(source)
    metadata = Metadata(reader)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    if metadata.architecture != "llama" or metadata.of_model("expert_count", 0):
        kind = "with experts " if metadata.of_model("expert_count", 0) else ""
        raise ConversionRefused(
            f"GGUF architecture `{metadata.architecture}` {kind}is not supported yet, only `llama`"
        )
    if "token_embd.weight" not in tensors or not metadata.get("tokenizer.ggml.tokens"):
        raise ConversionRefused("the file holds no embeddings or no vocabulary")
    config = model_config(metadata, tensors)
    build_tokenizer(metadata).save(str(folder / "tokenizer.json"))
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", generation_config(metadata))
    write_json(folder / "tokenizer_config.json", tokenizer_config(metadata))
    if template := metadata.get("tokenizer.chat_template"):
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    write_weights(folder / "model.safetensors", tensors, config)
    log.info("Convert: [1/1] -- Took: %s", timedelta(seconds=time.monotonic() - started))
