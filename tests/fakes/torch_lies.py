"""PyTorch files by hand: a pickle that claims anything, in an archive or in the older row."""

import pickle
import struct
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import torch


class StorageAt:
    """A storage under a key of the file, said to have so many numbers."""

    def __init__(self, numel: Any = 4, key: Any = "0", kind: Any = torch.FloatStorage) -> None:
        self.pid = ("storage", kind, key, "cpu", numel)


class Call:
    """A call of a function with any arguments."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.function, self.arguments = function, arguments

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return self.function, self.arguments


def claim(size: Any = (4,), stride: Any = (1,), offset: Any = 0, storage: Any = None) -> Call:
    """A tensor as torch.save describes it; by default one of four numbers."""
    rebuild: Any = torch._utils._rebuild_tensor_v2  # type: ignore[attr-defined]  # is untyped
    place = StorageAt() if storage is None else storage
    return Call(rebuild, place, offset, size, stride, False, OrderedDict())


class _Pickler(pickle.Pickler):
    def persistent_id(self, item: Any) -> Any:
        return item.pid if isinstance(item, StorageAt) else None


def pickled(value: Any, protocol: int = 2) -> bytes:
    file = BytesIO()
    _Pickler(file, protocol).dump(value)
    return file.getvalue()


FOUR = struct.pack("<4f", 1, 2, 3, 4)


def archive(
    path: Path,
    value: Any,
    data: Mapping[str, bytes] | None = None,
    *,
    kind: int = zipfile.ZIP_STORED,
    extra: Mapping[str, bytes] | None = None,
) -> Path:
    """A file as torch.save writes it; `value` may be the bytes of a pickle."""
    content = value if isinstance(value, bytes) else pickled(value)
    with zipfile.ZipFile(path, "w", kind) as file:
        file.writestr("m/data.pkl", content)
        file.writestr("m/byteorder", "little")
        for key, item in ({"0": FOUR} if data is None else data).items():
            file.writestr(f"m/data/{key}", item)
        for name, item in (extra or {}).items():
            file.writestr(name, item)
    return path


def row_of_pickles(
    path: Path, value: Any, *, keys: Any = ("0",), storages: bytes = struct.pack("<q", 4) + FOUR
) -> Path:
    """A file from before PyTorch 1.6."""
    head = (0x1950A86A20F9469CFC6C, 1001, {"protocol_version": 1001, "little_endian": True})
    parts = [pickled(part) for part in (*head, value, list(keys))]
    path.write_bytes(b"".join(parts) + storages)
    return path
