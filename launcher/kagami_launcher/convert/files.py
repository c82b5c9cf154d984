"""What a conversion writes: safetensors files and folders that appear whole or not at all.

Everything is written under a name that nobody reads, flushed to the disk and renamed. One tensor is
in memory at a time: safetensors' own writer wants all of a file's.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from kagami_launcher.model.folder import INDEX


class ConversionRefused(Exception):
    """The file cannot be converted faithfully; the text says why, for the operator."""


def shown(value: object) -> str:
    """Something of a file in a message: in backticks if it is text, one line, and never long."""
    if isinstance(value, list | dict | tuple):
        return f"a {type(value).__name__} of {len(value)}"
    text = repr(value[:100] if isinstance(value, str | bytes) else value)
    text = f"`{text[1:-1]}`" if isinstance(value, str) else text
    return text if len(text) <= 100 else f"{text[:100]}…"


class StoredTensor(NamedTuple):
    """A tensor to be written; `data` is called when the tensors before it are written."""

    name: str
    dtype: str  # safetensors' name: F32, BF16, …
    shape: Sequence[int]
    num_bytes: int
    data: Callable[[], Any]  # anything with the buffer protocol


def write_safetensors(
    path: Path, tensors: Iterable[StoredTensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write the tensors in their order, one at a time."""
    tensors = list(tensors)
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    offset = 0
    for item in tensors:
        end = offset + item.num_bytes
        shape = [int(size) for size in item.shape]
        header[item.name] = {"dtype": item.dtype, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data starts on a multiple of eight
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for item in tensors:
            file.write(item.data())


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """Name -> dtype, shape and place of a file's tensors; and where its data begins."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(size))
    header.pop("__metadata__", None)
    return header, 8 + size


def write_index(folder: Path, names: Sequence[str]) -> None:
    """Write the index over the named files of the folder."""
    weight_map: dict[str, str] = {}
    total = 0
    for name in names:
        header, _ = read_header(folder / name)
        total += sum(end - start for start, end in (t["data_offsets"] for t in header.values()))
        weight_map |= dict.fromkeys(header, name)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    with replaced(folder / INDEX) as path:
        write_json(path, index)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file for people to read."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A path to write to that becomes `path` if nothing is raised, and is removed otherwise."""
    work = path.with_name(f".{path.name}.incomplete")
    try:
        yield work
        _flush(work)
        work.rename(path)
    finally:
        work.unlink(missing_ok=True)
    _flush_directory(path.parent)


@contextmanager
def new_folder(destination: Path) -> Iterator[Path | None]:
    """A folder to fill that becomes `destination`, a snapshot of the hub cache; None: it is there.

    Conversions to the same model wait for one another.
    """
    destination.parent.mkdir(parents=True, exist_ok=True)
    model = destination.parent.parent
    with only_one(model):
        if (destination / "config.json").is_file():
            yield None
            return
        work = model / f".incomplete-{destination.name}"
        shutil.rmtree(work, ignore_errors=True)  # left by a conversion that was killed
        work.mkdir()
        try:
            yield work
            for path in work.iterdir():
                _flush(path)
            _flush_directory(work)
            work.rename(destination)
        finally:
            shutil.rmtree(work, ignore_errors=True)
        _flush_directory(destination.parent)


@contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Hold an advisory lock on the folder; the kernel lets go of it however this process ends."""
    with (folder / ".convert.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _flush_directory(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
