"""What a conversion writes: safetensors files and folders that appear whole or not at all.

Everything is written under a name that nobody reads, flushed to the disk and renamed. One tensor is
in memory at a time: safetensors' own writer wants all of a file's.
"""

import fcntl
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from kagami_launcher.model.folder import INDEX
from kagami_proto.model_files import check_header
from kagami_proto.panics import LibraryPanicked, exception_of

_MAX_SIDE_BYTES = 256 << 20


class ConversionRefused(Exception):
    """The file cannot be converted faithfully; the text says why, for the operator."""


def shown(value: object) -> str:
    """Something of a file in a message: in backticks if it is text, one line, and never long."""
    if isinstance(value, list | dict | tuple):
        return f"a {type(value).__name__} of {len(value)}"
    text = repr(value[:100] if isinstance(value, str | bytes) else value)
    text = f"`{text[1:-1]}`" if isinstance(value, str) else text
    return text if len(text) <= 100 else f"{text[:100]}…"


@contextmanager
def tokenizers_refusals(what: str) -> Iterator[None]:
    """For what the tokenizers library does not accept: it raises bare `Exception`s, and panics."""
    try:
        yield
    except ConversionRefused:
        raise
    except BaseException as error:
        reason = str(exception_of(error)).strip().partition("\n")[0]
        raise ConversionRefused(f"{what} makes no tokenizer: {reason[:200]}") from error


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
    if (free := shutil.disk_usage(path.parent).free) < offset:
        raise ConversionRefused(
            f"{path.name} takes {offset} bytes, and {path.parent} has {free} bytes of space"
        )
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for item in tensors:
            file.write(item.data())


def read_header(path: Path) -> tuple[dict[str, Any], int]:
    """Name -> dtype, shape and place of a file's tensors; and where its data begins."""
    with open_safetensors(path):  # has looked at every number of it
        pass
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(size))
    header.pop("__metadata__", None)
    return header, 8 + size


@contextmanager
def open_safetensors(path: Path, framework: str = "np") -> Iterator[Any]:
    """The library's handle; what it raises, also while it is used, is a refusal of the file."""
    try:
        check_header(path)
        with safe_open(path, framework=framework) as file:
            yield file
    except BaseException as error:  # it panics, too
        reason = exception_of(error)
        if not isinstance(reason, SafetensorError | LibraryPanicked):
            raise
        text = str(reason)[:200]
        raise ConversionRefused(f"{path} is not a safetensors file: {text}") from error


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


def copy_side_file(file: Path, folder: Path) -> None:
    """Copy a file that stands beside weights: settings, a tokenizer, code. None is large."""
    if (size := file.stat().st_size) > _MAX_SIDE_BYTES:
        raise ConversionRefused(f"{file} has {size} bytes, the limit is {_MAX_SIDE_BYTES}")
    shutil.copyfile(file, folder / file.name)


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A path to write to that becomes `path` if nothing is raised, and is removed otherwise."""
    work = path.with_name(f".{path.name}.incomplete")
    work.unlink(missing_ok=True)  # a link there would lead the writer elsewhere
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
    """Hold an advisory lock on the folder; the kernel lets go of it however this process ends.

    What lies under the lock's name in a foreign folder is neither followed, waited for nor emptied.
    """
    lock = folder / ".convert.lock"
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    descriptor = os.open(lock, flags, 0o666)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ConversionRefused(f"{lock} is no file: it cannot be a lock")
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _flush_directory(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
