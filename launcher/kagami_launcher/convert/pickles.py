"""PyTorch's pickled weights (.bin, .pt) -> safetensors, file by file.

A pickle is a program. It is never run: `torch_pickle.py` reads what it says of tensors and refuses
the rest, with and without --trust-remote-code. Files are memory-mapped, so what is in memory is
near one tensor; the page cache takes the rest. Every file is compared, byte by byte, with what was
written.
"""

import logging
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO

import torch
from torch import Tensor

from kagami_launcher.convert.files import (
    ConversionRefused,
    StoredTensor,
    open_safetensors,
    read_header,
    replaced,
    shown,
    write_index,
    write_safetensors,
)
from kagami_launcher.convert.torch_file import BadFile, open_tensors
from kagami_launcher.convert.torch_pickle import NotPlain, Unusable
from kagami_launcher.model.folder import torch_files

log = logging.getLogger(__name__)

_DTYPES: Mapping[torch.dtype, str] = MappingProxyType(
    {
        torch.float64: "F64",
        torch.float32: "F32",
        torch.float16: "F16",
        torch.bfloat16: "BF16",
        torch.float8_e4m3fn: "F8_E4M3",
        torch.float8_e5m2: "F8_E5M2",
        torch.int64: "I64",
        torch.int32: "I32",
        torch.int16: "I16",
        torch.int8: "I8",
        torch.uint8: "U8",
        torch.bool: "BOOL",
    }
)
_COMPARED_AT_ONCE = 1 << 24  # bytes


def is_dtype(name: str) -> bool:
    """Whether a checkpoint may have weights of this dtype, by safetensors' name."""
    return name in _DTYPES.values()


def dtype_name(dtype: torch.dtype) -> str:
    """safetensors' name of a dtype."""
    if dtype not in _DTYPES:
        raise ConversionRefused(f"safetensors has no {dtype}")
    return _DTYPES[dtype]


def convert_weights(source: Path, folder: Path) -> None:
    """Make `folder`'s safetensors files from `source`'s pickles; those already made stay."""
    files = torch_files(source)
    names = [safetensors_name(file) for file in files]
    for number, (file, name) in enumerate(zip(files, names, strict=True), 1):
        started = time.monotonic()
        if not (folder / name).is_file():
            convert_file(file, folder / name)
        took = timedelta(seconds=time.monotonic() - started)
        log.info("Convert: [%s/%s] -- Took: %s", number, len(files), took)
    if len(names) > 1:
        write_index(folder, names)


def safetensors_name(file: Path) -> str:
    """`pytorch_model-00001-of-00002.bin` -> `model-00001-of-00002.safetensors`, as TGI does."""
    return file.stem.removeprefix("pytorch_") + ".safetensors"


def convert_file(source: Path, destination: Path) -> None:
    """Convert one file and check it; it appears under its name when both are done."""
    tensors = read_pickle(source)
    dropped = _duplicates(tensors, source.parent)
    chosen = {name: tensor for name, tensor in tensors.items() if name not in dropped}
    with replaced(destination) as work:
        write_safetensors(work, [stored(name, chosen[name]) for name in chosen], dropped)
        _compare(work, chosen)


def read_pickle(path: Path) -> dict[str, Tensor]:
    """The tensors of a .bin or .pt file, mapped into memory; refuses whatever else it holds."""
    try:
        loaded = open_tensors(path)
    except NotPlain as error:
        raise ConversionRefused(
            f"{path.name} is not a plain file of tensors, and what else a pickle holds is not run, "
            f"with or without `--trust-remote-code`: ask for a safetensors version ({error})"
        ) from error
    except (BadFile, ValueError) as error:
        raise ConversionRefused(f"{path.name} cannot be read: {error}") from error
    if isinstance(loaded, dict) and isinstance(loaded.get("state_dict"), dict):
        loaded = loaded["state_dict"]
    if not isinstance(loaded, dict):
        raise ConversionRefused(f"{path.name} holds a {type(loaded).__name__}, expected weights")
    for name, tensor in loaded.items():
        if isinstance(tensor, Unusable):
            raise ConversionRefused(
                f"{path.name}: {shown(name)} is {tensor.kind}; safetensors has no such"
            )
        if not isinstance(tensor, Tensor):
            raise ConversionRefused(
                f"{path.name}: {shown(name)} is a {type(tensor).__name__}, expected a tensor"
            )
    return {str(name): tensor for name, tensor in loaded.items()}


def stored(name: str, tensor: Tensor) -> StoredTensor:
    """A tensor as the writer takes it; a view is made contiguous when it is written."""
    return StoredTensor(
        name,
        _DTYPES[tensor.dtype],
        tuple(tensor.shape),
        tensor.numel() * tensor.element_size(),
        lambda: as_bytes(tensor).numpy(),
    )


def as_bytes(tensor: Tensor) -> Tensor:
    """All of a tensor as one row of bytes."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def _duplicates(tensors: Mapping[str, Tensor], folder: Path) -> dict[str, str]:
    """Names that the model ties to another one with the very same data -> that other name.

    Names that share data without being tied all stay: the model would miss them.
    """
    groups: dict[object, list[str]] = {}
    for name, tensor in tensors.items():
        place = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        if tensor.numel():
            groups.setdefault(place, []).append(name)
    shared = [names for names in groups.values() if len(names) > 1]
    if not shared:
        return {}
    tied = _tied_names(folder)
    dropped: dict[str, str] = {}
    for names in shared:
        untied = [name for name in names if name not in tied]
        if untied:
            dropped |= {name: untied[0] for name in names if name in tied}
    return dropped


def _tied_names(folder: Path) -> Sequence[str]:
    """Weights that the model's class ties to others; empty where that is not known for sure."""
    transformers = import_module("transformers")  # seconds: only where weights are shared
    try:
        config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
        model_class = transformers.AutoModelForCausalLM._model_mapping[type(config)]
    except Exception:  # what a config.json makes transformers raise has no bounds
        return ()
    if not getattr(config, "tie_word_embeddings", False):
        return ()
    return tuple(model_class._tied_weights_keys or ())


def _compare(path: Path, expected: Mapping[str, Tensor]) -> None:
    """Read the file again: its names as safetensors reads them, its data byte by byte."""
    with open_safetensors(path) as file:
        if set(file.keys()) != set(expected):
            raise RuntimeError(f"The output tensors do not match for {path.name}")
    header, begin = read_header(path)
    with path.open("rb") as data:
        for name, tensor in expected.items():
            entry = header[name]
            is_alike = (entry["dtype"], entry["shape"]) == (
                _DTYPES[tensor.dtype],
                list(tensor.shape),
            )
            data.seek(begin + entry["data_offsets"][0])
            if not is_alike or not _follows(as_bytes(tensor), data):
                raise RuntimeError(f"The output tensors do not match for key {name}")


def _follows(expected: Tensor, data: BinaryIO) -> bool:
    """Whether the next bytes of the file are these."""
    for start in range(0, len(expected), _COMPARED_AT_ONCE):
        part = expected[start : start + _COMPARED_AT_ONCE]
        if part.numpy().tobytes() != data.read(len(part)):
            return False
    return True
