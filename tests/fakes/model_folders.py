"""Folders with a tiny llama, sound ones and such as a hostile author would write."""

import json
from collections.abc import Mapping
from pathlib import Path
from random import Random
from types import MappingProxyType
from typing import Any, NamedTuple

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


# ---------------------------------------------------------------------- mutants

SIZES = (0, 1, 2, 7, 16, 31, 33, 40, 48, 64, 96, 1000)
VALUES = (
    *(0, -1, 1, 2, 3, 7, 8, 16, 31, 64, 1000, 2**31 - 1, 2**31, 2**63, 10**40),
    *(0.0, 1.5, -1.0, 1e-300, 1e300, float("nan"), float("inf"), -float("inf")),
    *("", "x", "64", None, True, [], [1], {}, {"a": 1}),
)
DTYPES = (
    *(torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn),
    *(torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool),
)
ROPES = (
    *("default", "linear", "dynamic", "yarn", "llama3", "longrope"),
    *("mystery", None, 3),
)
WORDS = (
    *("head_dim", "sliding_window", "attention_bias", "mlp_bias", "rope_scaling"),
    *("rope_parameters", "quantization_config", "layer_types", "text_config", "model_type"),
)


class Folder(NamedTuple):
    """What is written of a model."""

    config: dict[str, Any]
    weights: dict[str, Tensor]


def mutant(number: int, config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Folder:
    """A sound model with one to three changes; the same for the same number."""
    random = Random(number)
    folder = Folder(json.loads(json.dumps(dict(config))), dict(weights))
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        random.choice((_shape, _shape, _shape, _dtype, _drop, _number, _field, _field, _rope))(
            folder, random
        )
    return folder


def _any_name(folder: Folder, random: Random) -> str:
    return random.choice(sorted(folder.weights) or ["lost"])


def _shape(folder: Folder, random: Random) -> None:
    name = _any_name(folder, random)
    tensor = folder.weights.get(name, torch.zeros(2, 2))
    shape = list(tensor.shape)
    match random.randrange(5):
        case 0:
            shape = shape[::-1]
        case 1:
            shape.insert(random.randrange(len(shape) + 1), random.choice((1, 2)))
        case 2 if shape:
            del shape[random.randrange(len(shape))]
        case _ if shape:
            shape[random.randrange(len(shape))] = random.choice(SIZES)
    flat = tensor.reshape(-1)
    count = torch.Size(shape).numel()
    repeats = -(-count // max(1, len(flat)))
    source = flat.repeat(repeats) if len(flat) else torch.zeros(count, dtype=tensor.dtype)
    folder.weights[name] = source[:count].reshape(shape)


def _dtype(folder: Folder, random: Random) -> None:
    name = _any_name(folder, random)
    if name in folder.weights:
        folder.weights[name] = folder.weights[name].to(random.choice(DTYPES))


def _drop(folder: Folder, random: Random) -> None:
    folder.weights.pop(_any_name(folder, random), None)


def _number(folder: Folder, random: Random) -> None:
    tensor = folder.weights.get(_any_name(folder, random))
    if tensor is not None and tensor.numel() and tensor.is_floating_point():
        changed = tensor.float().reshape(-1).clone()
        value = random.choice((float("nan"), float("inf"), -float("inf"), 3e38, 0.0))
        changed[random.randrange(len(changed))] = value
        name = next(name for name, each in folder.weights.items() if each is tensor)
        folder.weights[name] = changed.reshape(tensor.shape).to(tensor.dtype)


def _field(folder: Folder, random: Random) -> None:
    fields = folder.config
    if isinstance(inner := fields.get("quantization_config"), dict) and random.random() < 0.5:
        fields = inner
    name = random.choice((*sorted(fields), *WORDS))
    fields[name] = random.choice(VALUES)


def _rope(folder: Folder, random: Random) -> None:
    numbers = ("factor", "rope_theta", "original_max_position_embeddings", "low_freq_factor",
               "high_freq_factor", "beta_fast", "attention_factor", "short_factor", "long_factor",
               "partial_rotary_factor")  # fmt: skip
    chosen = random.sample(numbers, random.randrange(len(numbers)))
    folder.config[random.choice(("rope_scaling", "rope_parameters"))] = {
        "rope_type": random.choice(ROPES), **{name: random.choice(VALUES) for name in chosen}
    }  # fmt: skip
