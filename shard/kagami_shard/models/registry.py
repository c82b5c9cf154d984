"""The families of models that the decoder runs, by one table."""

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from kagami_shard.machine.distributed import TensorParallel
from kagami_shard.models.config import Config
from kagami_shard.models.decoder import Decoder
from kagami_shard.quantization.select import select_scheme
from kagami_shard.weights.checkpoint import Checkpoint

# `model_type` of config.json -> the module of this package whose `spec(config, max_length)` it has.
FAMILIES: Mapping[str, str] = MappingProxyType(
    {
        "gemma2": "gemma2",
        "gemma3": "gemma3",
        "gemma3_text": "gemma3",
        "granite": "granite",
        "llama": "llama",
        "mistral": "mistral",
        "olmo2": "olmo2",
        "phi3": "phi3",
        "qwen2": "qwen2",
        "qwen3": "qwen3",
        "starcoder2": "starcoder2",
    }
)


def load_decoder(
    folder: Path,
    config: Config,
    *,
    dtype: torch.dtype,
    device: torch.device,
    max_length: int,
    parallel: TensorParallel,
    quantize: str | None,
    defers: bool,
) -> Decoder:
    """The model of `folder`, whose type is one of `FAMILIES`; arguments as `load_torch` has them.

    Raises `UnsupportedModel` or `InvalidCheckpoint`.
    """
    scheme = select_scheme(_quantization_config(config), quantize)
    family = import_module(f"kagami_shard.models.{FAMILIES[config.model_type]}")
    spec = family.spec(config, max_length)
    with Checkpoint(folder) as checkpoint:
        return Decoder(
            spec,
            checkpoint,
            dtype=dtype,
            device=device,
            parallel=parallel,
            scheme=scheme,
            defers=defers,
        )


def _quantization_config(config: Config) -> Mapping[str, Any] | None:
    """What config.json says of its weights; compressed-tensors once had a key of its own."""
    found = getattr(config, "quantization_config", None)
    found = found or getattr(config, "compression_config", None)
    return found if found is None or isinstance(found, Mapping) else found.to_dict()
