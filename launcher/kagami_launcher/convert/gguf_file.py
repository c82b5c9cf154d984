"""Opens a GGUF file: its key-values, and its tensors where they lie in the mapped file.

A file may lie. Each count, length, dimension and offset is compared with the bytes that are there
before it is used, so a file costs time and memory by its size and not by what it says. The gguf
package's reader believes a file, and makes two arrays for each element of a vocabulary; from that
package come the types and, elsewhere, what they mean as numbers.
"""

import math
import mmap
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from kagami_launcher.convert.files import ConversionRefused, shown

_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32
# The largest models have some 2,000 tensors, and files 30 to 60 keys.
_MAX_TENSORS, _MAX_KEY_VALUES = 1 << 16, 1 << 12
# The largest vocabularies have 262,144 tokens, and twice as many merges.
_MAX_STRINGS = 1 << 22
_MAX_KEY_BYTES, _MAX_NAME_BYTES = 65535, 127  # of the format's description; twice llama.cpp's 63
_MAX_DIMENSIONS = 4

# The format's number of a type -> numpy's. 8 is text and 9 an array of any other.
_NUMBERS: Mapping[int, Any] = MappingProxyType(
    {
        0: np.dtype("u1"),
        1: np.dtype("i1"),
        2: np.dtype("<u2"),
        3: np.dtype("<i2"),
        4: np.dtype("<u4"),
        5: np.dtype("<i4"),
        6: np.dtype("<f4"),
        7: np.dtype("?"),
        10: np.dtype("<u8"),
        11: np.dtype("<i8"),
        12: np.dtype("<f8"),
    }
)
_TEXT, _ARRAY = 8, 9

Value = bool | int | float | bytes | list[bytes] | list[bool] | list[int] | list[float]


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """A tensor as a checkpoint counts it, rows first; `data` are the bytes of each row."""

    name: str
    shape: tuple[int, ...]
    tensor_type: GGMLQuantizationType
    data: Any


@dataclass(frozen=True, slots=True)
class GgufFile:
    """What a file holds; text is still bytes, because not all of it has to be UTF-8."""

    values: Mapping[str, Value]
    tensors: Mapping[str, GgufTensor]


def open_file(path: Path) -> GgufFile:
    """Map a file and find what is in it; raises `ConversionRefused`, `OSError`."""
    with path.open("rb") as file:
        size = file.seek(0, 2)
        if size < _Walk.HEADER_BYTES:
            raise ConversionRefused(f"it has {size} bytes, too few for a GGUF file")
        return _Walk(mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)).file()


class _Walk:
    """One walk over the file, from its first byte to where the tensors' data begins."""

    HEADER_BYTES = 24

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._size = len(data)
        self._at = 0
        self._num_strings = 0

    def file(self) -> GgufFile:
        if (magic := self._bytes(4)) != b"GGUF":
            raise ConversionRefused(f"it begins with {magic!r}, expected b'GGUF'")
        if (version := self._number("<I", "version")) not in _VERSIONS:
            raise ConversionRefused(f"GGUF version {version} is not supported, only 2 and 3")
        num_tensors = self._number("<Q", "tensor count")
        num_values = self._number("<Q", "key-value count")
        self._check_count("tensor count", num_tensors, limit=_MAX_TENSORS, least_bytes=25)
        self._check_count("key-value count", num_values, limit=_MAX_KEY_VALUES, least_bytes=13)
        values: dict[str, Value] = {}
        for number in range(num_values):
            key = self._name(f"key {number}", _MAX_KEY_BYTES)
            if key in values:
                raise ConversionRefused(f"key {shown(key)} is there twice")
            values[key] = self._value(shown(key))
        infos = [self._tensor_info(number) for number in range(num_tensors)]
        return GgufFile(values, self._tensors(infos, _alignment(values)))

    # --- pieces -----------------------------------------------------------------------------------

    def _bytes(self, size: int, what: str = "header") -> bytes:
        if size > self._size - self._at:
            self._refuse_length(what, size)
        start, self._at = self._at, self._at + size
        return self._data[start : self._at]

    def _number(self, form: str, what: str) -> int:
        (value,) = struct.unpack(form, self._bytes(struct.calcsize(form), what))
        return int(value)

    def _name(self, what: str, limit: int) -> str:
        size = self._number("<Q", what)
        if size > limit:
            raise ConversionRefused(f"{what} has a name of {size} bytes, the limit is {limit}")
        try:
            return self._bytes(size, what).decode()
        except UnicodeDecodeError as error:
            raise ConversionRefused(f"{what} has a name that is not UTF-8: {error}") from error

    def _value(self, what: str) -> Value:
        kind = self._number("<I", what)
        if kind == _TEXT:
            return self._bytes(self._number("<Q", what), what)
        if kind == _ARRAY:
            return self._array(what)
        if (dtype := _NUMBERS.get(kind)) is None:
            raise ConversionRefused(f"{what} has type {kind}, which is none of GGUF")
        value: bool | int | float = np.frombuffer(self._bytes(dtype.itemsize, what), dtype)[
            0
        ].item()
        return value

    def _array(self, what: str) -> Value:
        kind = self._number("<I", what)
        count = self._number("<Q", what)
        if kind == _TEXT:
            self._num_strings += count
            self._check_count(f"{what}, its elements", count, limit=_MAX_STRINGS, least_bytes=8)
            if self._num_strings > _MAX_STRINGS:
                raise ConversionRefused(f"more than {_MAX_STRINGS} strings in arrays, at {what}")
            return self._strings(count, what)
        if (dtype := _NUMBERS.get(kind)) is None:
            raise ConversionRefused(f"{what} is an array of type {kind}, which GGUF does not have")
        self._check_count(
            f"{what}, its elements", count, limit=_MAX_STRINGS, least_bytes=dtype.itemsize
        )
        values = np.frombuffer(self._bytes(count * dtype.itemsize, what), dtype)
        listed: Value = values.tolist()
        return listed

    def _strings(self, count: int, what: str) -> list[bytes]:
        # The hot loop of a conversion: a vocabulary has hundreds of thousands.
        data, at, end = self._data, self._at, self._size
        length_at = struct.Struct("<Q").unpack_from
        found: list[bytes] = []
        for _ in range(count):
            if at + 8 > end:
                self._refuse_length(what, 8)
            stop = at + 8 + length_at(data, at)[0]
            if stop > end:
                self._at = at
                self._refuse_length(f"{what}, element {len(found)}", stop - at - 8)
            found.append(data[at + 8 : stop])
            at = stop
        self._at = at
        return found

    def _check_count(self, what: str, count: int, *, limit: int, least_bytes: int) -> None:
        if count > limit:
            raise ConversionRefused(f"{what}: {count}, the limit is {limit}")
        if count * least_bytes > self._size - self._at:
            self._refuse_length(what, count * least_bytes)

    def _refuse_length(self, what: str, size: int) -> NoReturn:
        raise ConversionRefused(
            f"{what} takes {size} bytes, and the file has {self._size - self._at} more"
        )

    # --- tensors ----------------------------------------------------------------------------------

    def _tensor_info(self, number: int) -> tuple[str, tuple[int, ...], int, int]:
        name = self._name(f"tensor {number}", _MAX_NAME_BYTES)
        what = f"tensor {shown(name)}"
        num_dimensions = self._number("<I", what)
        if not 1 <= num_dimensions <= _MAX_DIMENSIONS:
            raise ConversionRefused(
                f"{what} has {num_dimensions} dimensions, expected 1 to {_MAX_DIMENSIONS}"
            )
        shape = [self._number("<Q", what) for _ in range(num_dimensions)]
        return name, tuple(reversed(shape)), self._number("<I", what), self._number("<Q", what)

    def _tensors(
        self, infos: Iterable[tuple[str, tuple[int, ...], int, int]], alignment: int
    ) -> dict[str, GgufTensor]:
        begin = -(-self._at // alignment) * alignment
        found: dict[str, GgufTensor] = {}
        places: list[tuple[int, int, str]] = []
        for name, shape, kind, offset in infos:
            what = f"tensor {shown(name)}"
            if name in found:
                raise ConversionRefused(f"{what} is there twice")
            tensor_type, row_bytes = _row(what, shape, kind)
            size = math.prod(shape[:-1]) * row_bytes
            if offset % alignment:
                raise ConversionRefused(
                    f"{what} begins at offset {offset}, which is no multiple of {alignment}"
                )
            if begin + offset + size > self._size:
                raise ConversionRefused(
                    f"{what} of shape {list(shape)} and type {tensor_type.name} takes {size} bytes "
                    f"at {begin + offset}, and the file has {self._size}"
                )
            data = np.frombuffer(self._data, np.uint8, size, begin + offset)
            rows = data.reshape(-1, row_bytes)
            found[name] = GgufTensor(name, shape, tensor_type, rows)
            places.append((offset, offset + size, name))
        _refuse_overlaps(places)
        return found


def _row(what: str, shape: tuple[int, ...], kind: int) -> tuple[GGMLQuantizationType, int]:
    """The type of a tensor, and how many bytes a row of it takes."""
    if kind not in set(GGMLQuantizationType):
        raise ConversionRefused(f"{what} has type {kind}, which is not known")
    tensor_type = GGMLQuantizationType(kind)
    block, block_bytes = GGML_QUANT_SIZES[tensor_type]
    if 0 in shape or shape[-1] % block:
        raise ConversionRefused(
            f"{what} has shape {list(shape)}, and rows of type {tensor_type.name} have a multiple "
            f"of {block} numbers"
        )
    return tensor_type, shape[-1] // block * block_bytes


def _alignment(values: Mapping[str, Value]) -> int:
    value = values.get("general.alignment", _DEFAULT_ALIGNMENT)
    if type(value) is not int or value < 1 or value & (value - 1):
        raise ConversionRefused(f"`general.alignment` is {shown(value)}, expected a power of two")
    return value


def _refuse_overlaps(places: list[tuple[int, int, str]]) -> None:
    places.sort()
    for (_, end, name), (start, _, other) in pairwise(places):
        if start < end:
            raise ConversionRefused(
                f"tensors {shown(name)} and {shown(other)} overlap: one ends at offset {end}, the "
                f"other begins at {start}"
            )
