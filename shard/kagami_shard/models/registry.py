"""Which code runs a model: the decoder by one table of families, transformers for the rest."""

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from types import MappingProxyType

import torch
from transformers import AutoConfig, PreTrainedConfig

from kagami_proto.errors import InvalidCheckpoint, UnsupportedModel
from kagami_shard.distributed import Alone, TensorParallel
from kagami_shard.models.base import Model
from kagami_shard.models.decoder import Decoder
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


def load_model(
    folder: Path,
    *,
    dtype: torch.dtype,
    device: torch.device,
    trust_remote_code: bool = False,
    max_length: int = 0,
    parallel: TensorParallel | None = None,
) -> Model:
    """The model of `folder`, its weights read and cast to `dtype` on `device`.

    `max_length` is the longest sequence to be served, 0 for all the model can; LongRoPE and
    dynamic NTK choose their frequencies by it. Of several ranks (`parallel`) each reads its part.
    Raises `UnsupportedModel` or `InvalidCheckpoint`.
    """
    parallel = parallel or Alone()
    config = read_config(folder, trust_remote_code=trust_remote_code)
    if config.is_encoder_decoder:
        raise UnsupportedModel(
            f"model type {config.model_type}: an encoder-decoder; only decoders are served"
            f" ({folder})"
        )
    if (family := FAMILIES.get(config.model_type)) is None:
        if parallel.size > 1:
            raise UnsupportedModel(
                f"model type {config.model_type} runs with transformers' own code and cannot be "
                f"cut into {parallel.size} shards: start it with --num-shard 1"
            )
        transformers_path = import_module("kagami_shard.models.transformers")
        model: Model = transformers_path.load_transformers(
            folder, config, dtype=dtype, device=device, trust_remote_code=trust_remote_code
        )
        return model
    if getattr(config, "quantization_config", None) is not None:
        raise UnsupportedModel(
            f"model type {config.model_type}: quantized weights are not served yet ({folder})"
        )
    spec = import_module(f"kagami_shard.models.{family}").spec(config, max_length)
    with Checkpoint(folder) as checkpoint:
        return Decoder(spec, checkpoint, dtype=dtype, device=device, parallel=parallel)


def read_config(folder: Path, *, trust_remote_code: bool = False) -> PreTrainedConfig:
    """config.json with transformers' defaults and names."""
    file = folder / "config.json"
    if not file.is_file():
        raise InvalidCheckpoint(f"{file} does not exist")
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (ValueError, KeyError, OSError) as error:
        first_line = str(error).strip().partition("\n")[0]
        raise UnsupportedModel(f"{file} cannot be read: {first_line}") from error
