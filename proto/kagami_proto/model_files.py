"""Reads the small files of a model folder, which may be hostile: bounded, and with one error.

A file that is too long, too deep, no UTF-8, no JSON or of another shape becomes `BrokenFile`, whose
text names the file. Large files (weights) are mapped by whoever needs them; of these, only the
length of a header is looked at here.
"""

import json
from pathlib import Path, PurePosixPath
from typing import Any

import msgspec

# The largest config.json known has 300 KB, a tokenizer_config.json some MB.
MAX_JSON_BYTES = 16 << 20
# An index of a model with 100,000 tensors has 10 MB.
MAX_INDEX_BYTES = 64 << 20
_MAX_WEIGHT_FILES = 10_000
# Of a .safetensors file: 120 bytes for a tensor.
MAX_HEADER_BYTES = 32 << 20
_MAX_NAME = 255  # of a file system


class BrokenFile(ValueError):
    """A file of a model folder is not what it has to be; the text names it, and says why."""


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


def read_object(path: Path, *, max_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """The JSON object in a file; raises `BrokenFile`, also if there is no such file."""
    content = _content(path, max_bytes)
    try:
        value = json.loads(content.decode("utf-8"))
    except RecursionError as error:
        raise BrokenFile(f"cannot read {path}: its JSON is nested too deeply") from error
    except ValueError as error:
        raise BrokenFile(f"cannot read {path}: {error}") from error
    if not isinstance(value, dict):
        raise BrokenFile(f"{path} holds no JSON object")
    return value


def read_optional_object(path: Path) -> dict[str, Any]:
    """The same; empty if there is no such file."""
    return read_object(path) if path.is_file() else {}


def read_index(path: Path) -> dict[str, str]:
    """Tensor -> file, of an index of weights; each file is in the index's folder or below it."""
    content = _content(path, MAX_INDEX_BYTES)
    try:
        weight_map = msgspec.json.decode(content, type=_Index).weight_map
    except (msgspec.MsgspecError, RecursionError, ValueError) as error:
        raise BrokenFile(
            f"cannot read {path}: no weight_map of tensors to files: {error}"
        ) from error
    if not weight_map:
        raise BrokenFile(f"cannot read {path}: its weight_map is empty")
    names = set(weight_map.values())
    if len(names) > _MAX_WEIGHT_FILES:
        raise BrokenFile(f"{path} names {len(names)} files, the limit is {_MAX_WEIGHT_FILES}")
    for name in names:
        if not _is_inside(name):
            raise BrokenFile(
                f"{path} names {name[:100]!r}, expected a file in the folder or below it"
            )
    return weight_map


def special_token_text(value: object) -> str | None:
    """A special token's text: a file has it as text, or as `{"content": text, …}`."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _is_inside(name: str) -> bool:
    parts = PurePosixPath(name).parts
    return (
        bool(parts)
        and "\0" not in name
        and not {"/", "//", ".."} & set(parts)
        and all(len(part.encode("utf-8", "surrogatepass")) <= _MAX_NAME for part in parts)
        and len(parts) < 8
    )


def check_header(path: Path) -> None:
    """Refuse a .safetensors file whose header is said to be longer than any model's."""
    try:
        if not path.is_file():  # a pipe would be waited for
            raise BrokenFile(f"cannot read {path}: it is no regular file")
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
    except OSError as error:
        raise BrokenFile(f"cannot read {path}: {error.strerror}") from error
    if size > MAX_HEADER_BYTES:
        raise BrokenFile(
            f"{path} is said to have a header of {size} bytes, the limit is {MAX_HEADER_BYTES}"
        )


def _content(path: Path, max_bytes: int) -> bytes:
    try:
        if not path.is_file():  # a pipe or a device would be read without end
            raise BrokenFile(f"cannot read {path}: there is no such file")
        if (size := path.stat().st_size) > max_bytes:
            raise BrokenFile(f"{path} has {size} bytes, the limit is {max_bytes}")
        return path.read_bytes()
    except OSError as error:
        raise BrokenFile(f"cannot read {path}: {error.strerror}") from error
