"""What a model folder holds and what it lacks, by the names of its files; reads no weights.

servable      config.json, tokenizer.json, .safetensors weights
convertible   the missing ones of these can be made: .bin or .pt -> weights,
              tokenizer.model -> tokenizer.json
adapter       adapter_config.json and no weights of a model: it is merged into its base
"""

import re
from pathlib import Path

from kagami_proto.model_files import read_index

INDEX = "model.safetensors.index.json"
TORCH_INDEX = "pytorch_model.bin.index.json"
ADAPTER_CONFIG = "adapter_config.json"
# Files beside a model's own weights; the shard leaves out the same.
_NOT_WEIGHTS = ("consolidated", "training", "optimizer", "scheduler", "adapter", "arguments")
_NUMBERED = re.compile(r"-(\d+)-of-(\d+)\.safetensors$")


def problem(folder: Path) -> str:
    """Why the folder cannot be served as it is; empty if it can."""
    for name in ("config.json", "tokenizer.json"):
        if not (folder / name).is_file():
            return f"no {name} in {folder}"
    missing = missing_weights(folder)
    return f"{missing} in {folder}" if missing else ""


def obstacle(folder: Path) -> str:
    """Why no conversion can make the folder servable; empty if one can."""
    if not (folder / "config.json").is_file():
        return f"no config.json in {folder}"
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        return f"no tokenizer.json in {folder}, and no tokenizer.model to make it from"
    missing = missing_weights(folder)
    if missing and (folder / INDEX).is_file() and not torch_files(folder):
        return f"{missing} in {folder}"
    if missing and not torch_files(folder):
        return f"no .safetensors weights in {folder}, and no .bin to make them from"
    lost = [file for file in torch_files(folder) if missing and not file.is_file()]
    if lost:
        num_files = len(torch_files(folder))
        return f"{len(lost)} of {num_files} weight files are missing in {folder}"
    return ""


def missing_weights(folder: Path) -> str:
    """Which .safetensors weights are missing, by the index, else by the numbers in file names."""
    if (folder / INDEX).is_file():
        files = _indexed(folder / INDEX)
        lost = [file for file in files if not file.is_file()]
        return f"{len(lost)} of {len(files)} weight files are missing" if lost else ""
    names = [file.name for file in _weights(folder, "*.safetensors")]
    totals = {int(found[2]) for name in names if (found := _NUMBERED.search(name))}
    if len(totals) == 1 and (total := totals.pop()) > len(names):
        return f"{total - len(names)} of {total} weight files are missing"
    return "" if names else "no .safetensors weights"


def torch_files(folder: Path) -> list[Path]:
    """PyTorch's pickled weights: the files of the index, else all .bin, else all .pt files."""
    if (folder / TORCH_INDEX).is_file():
        return _indexed(folder / TORCH_INDEX)
    for pattern in ("pytorch_model*.bin", "*.bin", "*.pt"):
        if found := _weights(folder, pattern):
            return found
    return []


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights now: safetensors if they are complete, else pickles."""
    if missing_weights(folder):
        return torch_files(folder)
    if (folder / INDEX).is_file():
        return _indexed(folder / INDEX)
    return _weights(folder, "*.safetensors")


def is_adapter(folder: Path) -> bool:
    """Whether the folder holds an adapter and not the model it adapts."""
    if not (folder / ADAPTER_CONFIG).is_file():
        return False
    return bool(missing_weights(folder)) and not torch_files(folder)


def side_files(folder: Path) -> list[Path]:
    """A model's files beside its weights: settings, tokenizer, templates, code."""
    suffixes = {".json", ".model", ".txt", ".jinja", ".py"}
    indexes = {INDEX, TORCH_INDEX}
    return sorted(
        file
        for file in folder.iterdir()
        if file.suffix in suffixes and file.name not in indexes and file.is_file()
    )


def _indexed(index: Path) -> list[Path]:
    """The files that an index names; raises `BrokenFile`."""
    return sorted({index.parent / name for name in read_index(index).values()})


def _weights(folder: Path, pattern: str) -> list[Path]:
    return sorted(
        file
        for file in folder.glob(pattern)
        if not any(word in file.name for word in _NOT_WEIGHTS)
        and not file.name.startswith(".")
        and file.is_file()  # a pipe would be waited for
    )
