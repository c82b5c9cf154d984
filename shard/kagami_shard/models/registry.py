"""Which code runs a model: the decoder by one table of families, transformers for the rest."""

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from kagami_proto.errors import UnsupportedModel
from kagami_shard.machine.distributed import Alone, TensorParallel
from kagami_shard.models.base import Model
from kagami_shard.models.config import Config, read_config
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


def load_model(
    folder: Path,
    *,
    dtype: torch.dtype,
    device: torch.device,
    trust_remote_code: bool = False,
    max_length: int = 0,
    parallel: TensorParallel | None = None,
    quantize: str | None = None,
    defers: bool = False,
) -> Model:
    """The model of `folder`, its weights read and cast to `dtype` on `device`.

    `max_length` is the longest sequence to be served, 0 for all the model can; LongRoPE and
    dynamic NTK choose their frequencies by it. Of several ranks (`parallel`) each reads its part.
    `quantize` is a value of --quantize; what config.json says of its weights needs none.
    With `defers` the decoder's matrices are read when first used, or packed from the files.
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
        if quantize is not None:
            raise UnsupportedModel(
                f"--quantize {quantize}: model type {config.model_type} runs with transformers' "
                "own code, whose weights are not quantized: start it without --quantize"
            )
        transformers_path = import_module("kagami_shard.backends.torch.transformers")
        model: Model = transformers_path.load_transformers(
            folder, config, dtype=dtype, device=device, trust_remote_code=trust_remote_code
        )
        return model
    scheme = select_scheme(_quantization_config(config), quantize)
    spec = import_module(f"kagami_shard.models.{family}").spec(config, max_length)
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
