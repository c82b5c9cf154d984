"""Qwen2 and 2.5: biases on query, key and value; windows in the upper layers (arXiv:2407.10671)."""

from kagami_shard.models.config import Config
from kagami_shard.models.spec import ModelSpec, llama_like, windows_of


def spec(config: Config, max_length: int) -> ModelSpec:
    return llama_like(config, max_length, windows=windows_of(config), qkv_bias=True)
