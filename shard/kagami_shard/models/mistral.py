"""Mistral 7B and its kin: Llama with a window in every layer (arXiv:2310.06825)."""

from kagami_shard.models.config import Config
from kagami_shard.models.spec import ModelSpec, llama_like, windows_of


def spec(config: Config, max_length: int) -> ModelSpec:
    return llama_like(config, max_length, windows=windows_of(config))
