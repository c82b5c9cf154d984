"""Folders with a tiny llama, sound ones and such as a hostile author would write."""

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

CONFIG: Mapping[str, Any] = MappingProxyType(
    {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_act": "silu",
        "hidden_size": 32,
        "intermediate_size": 48,
        "max_position_embeddings": 64,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "vocab_size": 40,
        "eos_token_id": 2,
    }
)
"""Of `tensors`"""


def tensors(dtype: torch.dtype = torch.float32, *, tied: bool = False) -> dict[str, Tensor]:
    """A checkpoint as `CONFIG` describes it."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return (torch.randn(shape, generator=generator) / shape[-1] ** 0.5).to(dtype)

    found = {"model.embed_tokens.weight": random(40, 32), "model.norm.weight": random(32) + 1}
    if not tied:
        found["lm_head.weight"] = random(40, 32)
    for index in range(2):
        layer = f"model.layers.{index}."
        found |= {
            f"{layer}self_attn.q_proj.weight": random(32, 32),
            f"{layer}self_attn.k_proj.weight": random(16, 32),
            f"{layer}self_attn.v_proj.weight": random(16, 32),
            f"{layer}self_attn.o_proj.weight": random(32, 32),
            f"{layer}mlp.gate_proj.weight": random(48, 32),
            f"{layer}mlp.up_proj.weight": random(48, 32),
            f"{layer}mlp.down_proj.weight": random(32, 48),
            f"{layer}input_layernorm.weight": random(32) + 1,
            f"{layer}post_attention_layernorm.weight": random(32) + 1,
        }
    return found


def write_model(
    folder: Path, config: Mapping[str, Any] = CONFIG, weights: Mapping[str, Tensor] | None = None
) -> Path:
    """`folder`, with these two files in it."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(dict(config)))
    sound = tensors() if weights is None else weights
    save_file(
        {name: each.contiguous() for name, each in sound.items()}, folder / "model.safetensors"
    )
    return folder
