"""Loads a model for torch: as a decoder if there is a family, else in transformers' own code."""

from functools import partial
from importlib import import_module
from pathlib import Path

import torch

from kagami_proto.errors import UnsupportedModel
from kagami_shard.backends.torch.runner import Forward, Successor, TorchBackend, run_decoder
from kagami_shard.machine.distributed import Alone, TensorParallel
from kagami_shard.models.base import Model
from kagami_shard.models.config import Config
from kagami_shard.models.families import FAMILIES
from kagami_shard.models.registry import load_decoder, read_config


def load_torch(
    folder: Path,
    *,
    dtype: torch.dtype,
    device: torch.device,
    trust_remote_code: bool = False,
    max_length: int = 0,
    parallel: TensorParallel | None = None,
    quantize: str | None = None,
    defers: bool = False,
    memory_fraction: float = 1.0,
    successor: Successor | None = None,
) -> TorchBackend:
    """The model of `folder`, its weights read and cast to `dtype` on `device`.

    `max_length` is the longest sequence to be served; 0: the longest that the model can. LongRoPE
    and dynamic NTK choose their frequencies by it. Each rank of `parallel` reads its own part.
    `quantize` is a value of --quantize; weights that config.json describes need none.
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
    model: Model
    forward: Forward
    if config.model_type in FAMILIES:
        decoder = load_decoder(
            folder,
            config,
            dtype=dtype,
            device=device,
            max_length=max_length,
            parallel=parallel,
            quantize=quantize,
            defers=defers,
        )
        model, forward = decoder, partial(run_decoder, decoder)
    else:
        _check_transformers(config, parallel, quantize)
        # Its import takes seconds, and most models do not need it.
        transformers = import_module("kagami_shard.backends.torch.transformers")
        own = transformers.load_transformers(
            folder, config, dtype=dtype, device=device, trust_remote_code=trust_remote_code
        )
        model, forward = own, own.forward
    return TorchBackend(
        model,
        forward,
        dtype=dtype,
        device=device,
        memory_fraction=memory_fraction,
        num_ranks=parallel.size,
        successor=successor,
    )


def _check_transformers(config: Config, parallel: TensorParallel, quantize: str | None) -> None:
    """What transformers' own code cannot do."""
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
