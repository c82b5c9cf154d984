"""Opens a PyTorch file (.bin, .pt) without running its pickle: tensors that lie in the mapped file.

Two forms are read: the zip archive of today, and the row of pickles from before PyTorch 1.6. What
the pickle claims of a tensor is compared with the file before torch hears of it: its storage has to
be in the file, and the tensor in its storage. A tensor that is larger than its storage (a stride of
0 writes one number a million times) is refused, and so are tensors that together take more than
four times the file.
"""

import io
import math
import mmap
import struct
import warnings
import zipfile
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kagami_launcher.convert import torch_pickle
from kagami_launcher.convert.files import shown
from kagami_launcher.convert.torch_pickle import Claim, Storage, Unusable

# Of the pickle and of the zip's directory; those of 100,000 tensors have 10 MB.
_MAX_HEADER_BYTES = 16 << 20
_MAX_DIMENSIONS = 16
# Names of one tensor that is used in several places: T5 writes its embedding four times.
_MAX_SHARING = 4
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C

_DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {
        str(dtype).removeprefix("torch."): dtype
        for dtype in (
            torch.float64,
            torch.float32,
            torch.float16,
            torch.bfloat16,
            torch.float8_e4m3fn,
            torch.float8_e5m2,
            torch.int64,
            torch.int32,
            torch.int16,
            torch.int8,
            torch.uint8,
            torch.bool,
        )
    }
)


class BadFile(Exception):
    """The file does not hold what it claims; the text names the tensor, and the numbers."""


class _Place(NamedTuple):
    """Bytes of the file."""

    start: int
    size: int


def open_tensors(path: Path) -> Any:
    """What the file holds, each tensor of its outer two dicts as torch's, mapped.

    Raises `NotPlain` for what is no tensor and no plain value, `BadFile` and `ValueError` for a
    file that is damaged or lies.
    """
    with path.open("rb") as file:
        size = file.seek(0, 2)
        if not size:
            raise BadFile("it is empty")
        data = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
    is_archive = data[:4] == b"PK\3\4"
    value, places = _archive(path, data) if is_archive else _row_of_pickles(data)
    return _Tensors(data, places).within(value, depth=2)


# --- tensors --------------------------------------------------------------------------------------


class _Tensors:
    """Makes tensors of claims, where the file has their bytes."""

    def __init__(self, data: mmap.mmap, places: Mapping[str, _Place]) -> None:
        self._data = data
        self._places = places
        self._num_bytes = 0

    def within(self, value: Any, depth: int, name: str = "its value") -> Any:
        if isinstance(value, Claim):
            return self._tensor(name, value)
        if isinstance(value, dict) and depth:
            return {key: self.within(item, depth - 1, shown(key)) for key, item in value.items()}
        return value

    def _tensor(self, name: str, claim: Claim) -> Tensor | Unusable:
        storage = claim.storage
        dtype = _DTYPES.get(claim.dtype)
        storage_dtype = _DTYPES.get(storage.dtype)
        if dtype is None or storage_dtype is None:
            return Unusable(f"torch.strided, torch.{claim.dtype}")
        place = self._place(name, storage, storage.numel * storage_dtype.itemsize)
        size, stride = _sizes(name, "size", claim.size), _sizes(name, "stride", claim.stride)
        (offset,) = _sizes(name, "storage_offset", (claim.offset,))
        if len(size) != len(stride):
            raise BadFile(f"{name} has size {list(size)} and stride {list(stride)}")
        numel, available = math.prod(size), place.size // dtype.itemsize
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        if numel and (last >= available or numel > available):
            raise BadFile(
                f"{name} of size {list(size)}, stride {list(stride)} and storage_offset {offset} "
                f"does not fit into its storage {shown(storage.key)} of {available} numbers"
            )
        self._count(numel * dtype.itemsize, name)
        if not numel:
            return torch.empty(size, dtype=dtype)
        with warnings.catch_warnings(action="ignore"):  # nobody writes into it
            whole = torch.frombuffer(self._data, dtype=dtype, count=available, offset=place.start)
        return whole.as_strided(size, stride, offset)

    def _place(self, name: str, storage: Storage, num_bytes: int) -> _Place:
        place = self._places.get(storage.key)
        if place is None:
            raise BadFile(f"{name}: its storage {shown(storage.key)} is not in the file")
        if not 0 <= num_bytes <= place.size:
            raise BadFile(
                f"{name}: its storage {shown(storage.key)} is said to have {num_bytes} bytes, and "
                f"the file has {place.size} of it"
            )
        return _Place(place.start, num_bytes)

    def _count(self, num_bytes: int, name: str) -> None:
        self._num_bytes += num_bytes
        if self._num_bytes > _MAX_SHARING * len(self._data):
            raise BadFile(
                f"its tensors until {name} take {self._num_bytes} bytes, and the file has "
                f"{len(self._data)}: more than {_MAX_SHARING} names for the same data"
            )


def _sizes(name: str, what: str, value: Any) -> tuple[int, ...]:
    if not isinstance(value, tuple | list) or len(value) > _MAX_DIMENSIONS:
        raise BadFile(f"{name}: its {what} is not up to {_MAX_DIMENSIONS} numbers")
    for number in value:
        if type(number) is not int or not 0 <= number < 2**63:
            raise BadFile(f"{name}: its {what} has {_shown(number)}, expected 0 to 2^63 - 1")
    return tuple(value)


def _shown(value: Any) -> str:
    return str(value) if type(value) is int else f"a {type(value).__name__}"


# --- the archive ----------------------------------------------------------------------------------


def _archive(path: Path, data: mmap.mmap) -> tuple[Any, dict[str, _Place]]:
    """The value of its pickle, and where its storages lie, by their keys."""
    places = _entries(path, data)
    pickles = [name for name in places if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise BadFile(f"it has {len(pickles)} times a data.pkl, expected one")
    root = pickles[0].removesuffix("data.pkl")
    if (order := places.get(f"{root}byteorder")) and _content(data, order) != b"little":
        raise BadFile("its bytes are in another order than little-endian")
    value = torch_pickle.read(io.BytesIO(_content(data, places[pickles[0]])))
    prefix = f"{root}data/"
    return value, {
        name.removeprefix(prefix): place
        for name, place in places.items()
        if name.startswith(prefix)
    }


def _content(data: mmap.mmap, place: _Place) -> bytes:
    if place.size > _MAX_HEADER_BYTES:
        raise BadFile(f"its pickle has {place.size} bytes, the limit is {_MAX_HEADER_BYTES}")
    return data[place.start : place.start + place.size]


def _entries(path: Path, data: mmap.mmap) -> dict[str, _Place]:
    """Name -> bytes of each entry: stored as they are, in the file, and not upon one another."""
    _check_directory(data)
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, struct.error, OverflowError) as error:
        raise BadFile(f"its zip directory is damaged: {error}") from error
    found: dict[str, _Place] = {}
    spans = []
    for info in infos:
        name = info.filename
        if name in found:
            raise BadFile(f"entry {shown(name)} is there twice")
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            raise BadFile(
                f"entry {shown(name)} is compressed, from {info.file_size} to "
                f"{info.compress_size} bytes: PyTorch does not do that"
            )
        if info.flag_bits & 1:
            raise BadFile(f"entry {shown(name)} is encrypted")
        found[name] = place = _Place(_data_start(data, info), info.file_size)
        if place.start + place.size > len(data):
            raise BadFile(
                f"entry {shown(name)} has {place.size} bytes at {place.start}, and the file has "
                f"{len(data)}"
            )
        spans.append((info.header_offset, place.start + place.size, name))
    spans.sort()
    for (_, end, name), (start, _, other) in pairwise(spans):
        if start < end:
            raise BadFile(f"entries {shown(name)} and {shown(other)} overlap")
    return found


def _check_directory(data: mmap.mmap) -> None:
    """Refuse a zip whose directory is too long to be read: zipfile makes an object of each entry.

    PyTorch writes no comment behind it, so its end is at the file's end.
    """
    end = len(data) - 22
    if end < 0 or data[end : end + 4] != b"PK\5\6":
        raise BadFile("its zip directory is missing: the file is cut off")
    sizes = [*struct.unpack_from("<I", data, end + 12)]
    if end >= 20 and data[end - 20 : end - 16] == b"PK\6\7":
        # Its 64-bit form is said to be somewhere, and usually stands right before.
        sizes = [size for size in sizes if size != 0xFFFFFFFF]
        for at in (end - 76, *struct.unpack_from("<Q", data, end - 12)):
            if 0 <= at <= end - 56 and data[at : at + 4] == b"PK\6\6":
                sizes += struct.unpack_from("<Q", data, at + 40)
    if max(sizes, default=0) > _MAX_HEADER_BYTES:
        raise BadFile(f"its zip directory has {max(sizes)} bytes, the limit is {_MAX_HEADER_BYTES}")


def _data_start(data: mmap.mmap, info: zipfile.ZipInfo) -> int:
    at = info.header_offset
    if not 0 <= at <= len(data) - 30 or data[at : at + 4] != b"PK\3\4":
        raise BadFile(f"entry {shown(info.filename)} is said to begin at {at}, and does not")
    name_bytes, extra_bytes = struct.unpack_from("<HH", data, at + 26)
    return at + 30 + int(name_bytes) + int(extra_bytes)


# --- before PyTorch 1.6 ---------------------------------------------------------------------------


def _row_of_pickles(data: mmap.mmap) -> tuple[Any, dict[str, _Place]]:
    """A magic number, a version, the system, the value, the keys; then each key's data."""
    file = io.BytesIO(data[:_MAX_HEADER_BYTES])
    if torch_pickle.read(file) != _LEGACY_MAGIC:
        raise BadFile("it is no file of PyTorch's")
    _version, system = torch_pickle.read(file), torch_pickle.read(file)
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise BadFile("its bytes are in another order than little-endian")
    storages: dict[str, Storage] = {}
    value, keys = torch_pickle.read(file, storages), torch_pickle.read(file)
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise BadFile("it has no list of its storages")
    places: dict[str, _Place] = {}
    at = file.tell()
    for key in keys:
        if at + 8 > len(data):
            raise BadFile(f"storage {shown(key)} is behind the file's end")
        (numel,) = struct.unpack_from("<q", data, at)
        num_bytes = numel * _item_bytes(storages, key)
        if not 0 <= num_bytes <= len(data) - at - 8:
            raise BadFile(
                f"storage {shown(key)} has {numel} numbers, and the file {len(data) - at - 8} "
                "bytes more"
            )
        places[key] = _Place(at + 8, num_bytes)
        at += 8 + num_bytes
    return value, places


def _item_bytes(storages: Mapping[str, Storage], key: str) -> int:
    if key not in storages:
        raise BadFile(f"storage {shown(key)} belongs to no tensor")
    dtype = getattr(torch, storages[key].dtype)  # one of the table of storages
    return int(dtype.itemsize)
