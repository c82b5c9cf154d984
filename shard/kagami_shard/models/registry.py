"""From a checkpoint's folder to its config, and to the decoder if its family is in the table."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from kagami_proto.errors import InvalidCheckpoint, UnsupportedModel
from kagami_shard.machine.distributed import TensorParallel
from kagami_shard.models.bounds import check_bounds
from kagami_shard.models.config import Config, plain_config
from kagami_shard.models.decoder import Decoder
from kagami_shard.models.families import FAMILIES
from kagami_shard.quantization.select import select_scheme
from kagami_shard.weights.checkpoint import Checkpoint
from kagami_shard.weights.json_files import read_object

_MAX_TEXT = 300


def read_config(folder: Path, *, trust_remote_code: bool = False) -> Config:
    """config.json with defaults filled in: as it is, or by transformers.

    Raises `InvalidCheckpoint`, `UnsupportedModel`.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise InvalidCheckpoint(f"{file} does not exist")
    fields = read_object(file)
    check_bounds(fields, file)
    if (config := plain_config(fields)) is not None:
        return config
    # transformers is imported only for who needs it.
    read: Callable[..., Config] = import_module("kagami_shard.models.auto_config").read
    return read(folder, trust_remote_code=trust_remote_code)


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
    with _says_config(folder):
        scheme = select_scheme(_quantization_config(config), quantize)
        spec = FAMILIES[config.model_type](config, max_length)
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


@contextmanager
def _says_config(folder: Path) -> Iterator[None]:
    """What goes wrong while the fields of config.json are read becomes `UnsupportedModel`."""
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        line = " ".join(f"{type(error).__name__}: {error}".split())[:_MAX_TEXT]
        raise UnsupportedModel(f"{folder / 'config.json'} cannot be used: {line}") from error


def _quantization_config(config: Config) -> Mapping[str, Any] | None:
    """What config.json says of its weights; compressed-tensors once had a key of its own."""
    found = getattr(config, "quantization_config", None)
    found = found or getattr(config, "compression_config", None)
    return found if found is None or isinstance(found, Mapping) else found.to_dict()
