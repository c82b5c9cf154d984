"""Opens the safetensors files of a model folder and copies tensors into their final layout.

Files are memory-mapped and opened lazily: a tensor's pages are touched once, when it is copied,
cast to the model's dtype, into the tensor the model keeps, or packed from where it lies. Several
tensors may land in one, one below the other: that is how query, key and value become a single
matmul. A rank of several reads its own rows or columns only.
"""

from collections.abc import Collection, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kagami_proto.errors import InvalidCheckpoint
from kagami_proto.model_files import BrokenFile, check_header, read_index
from kagami_shard.weights.sharding import Span
from kagami_shard.weights.stored import StoredRows, drop_pages

INDEX = "model.safetensors.index.json"

# Files beside a model's own weights: the original format, training state, adapters.
NOT_WEIGHTS = ("consolidated", "training", "optimizer", "adapter", "arguments")

# What a matrix in full precision may be stored as.
FLOATS = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
)

_MAX_REASON = 300  # characters: the library repeats what it did not expect
# safetensors' names, of the formats of quantized weights.
_DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {
        "I8": torch.int8,
        "U8": torch.uint8,
        "I32": torch.int32,
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E5M2": torch.float8_e5m2,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        "F32": torch.float32,
        "F64": torch.float64,
        "I64": torch.int64,
    }
)

# Less than a byte each, for which torch has no dtype, and complex numbers.
_NO_WEIGHTS = frozenset({"F4", "F6_E2M3", "F6_E3M2", "C64"})


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that hold the model: those of the index, else all in the folder.

    Raises `InvalidCheckpoint` if there are none or one of the index's is missing.
    """
    index = folder / INDEX
    if index.is_file():
        files = sorted({folder / name for name in _weight_map(index).values()})
    else:
        files = sorted(
            file
            for file in folder.glob("*.safetensors")
            if not any(word in file.name for word in NOT_WEIGHTS)
        )
    if not files:
        raise InvalidCheckpoint(f"{folder} has no weights: no .safetensors file")
    for file in files:
        if not file.is_file():
            if file.exists():
                raise InvalidCheckpoint(f"{file} is no regular file")
            raise InvalidCheckpoint(f"{file} does not exist, but {index} names it")
    return files


def _weight_map(index: Path) -> Mapping[str, str]:
    try:
        return read_index(index)
    except BrokenFile as error:
        raise InvalidCheckpoint(str(error)) from error


class Checkpoint:
    """The tensors of one folder, by name. A context manager: it holds the files open."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.bytes_loaded = 0
        """Bytes that were asked for until now, in the files' own dtype"""
        self._stack = ExitStack()
        self._file_of: dict[str, Path] = {}
        self._handles: dict[Path, Any] = {}  # safetensors ships no types
        with ExitStack() as stack:
            for file in weight_files(folder):
                self._open(file, stack)
            self._stack = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stack.close()
        self._handles.clear()

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    @property
    def names(self) -> Collection[str]:
        """Of all tensors, in the order of the files."""
        return self._file_of.keys()

    def file_of(self, name: str) -> Path:
        """Where `name` is."""
        return self._file_of[name]

    def mapped(self, name: str) -> Tensor:
        """`name` where it lies: its pages are read when they are looked at."""
        tensor: Tensor = self._handle(name).get_tensor(name)
        return tensor

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of `name` as stored; reads the header only."""
        return tuple(self._handle(name).get_slice(name).get_shape())

    def check(
        self, name: str, shape: tuple[int, ...], *, dtypes: Sequence[torch.dtype] = FLOATS
    ) -> None:
        """Raises `InvalidCheckpoint` if `name` is missing, or stored in another shape or dtype."""
        if (found := self.shape(name)) != shape:
            raise InvalidCheckpoint(
                f"{self._file_of[name]}: {name} has the shape {list(found)}, config.json says "
                f"{list(shape)}"
            )
        if self.stored_dtype(name) not in dtypes:
            stored = self._handle(name).get_slice(name).get_dtype()
            raise InvalidCheckpoint(
                f"{self._file_of[name]}: {name} is {stored}, only "
                f"{', '.join(str(dtype).removeprefix('torch.') for dtype in dtypes)} can be read"
            )

    def matrix_shape(self, name: str) -> tuple[int, int]:
        """The shape of `name`, which has rows and columns, or `InvalidCheckpoint` is raised."""
        shape = self.shape(name)
        if len(shape) != 2:
            raise InvalidCheckpoint(
                f"{self._file_of[name]}: {name} has the shape {list(shape)}, it is no matrix"
            )
        return shape[0], shape[1]

    def stored_dtype(self, name: str) -> torch.dtype | None:
        """The dtype of `name` in its file; None for one that this torch does not have."""
        return _DTYPES.get(self._handle(name).get_slice(name).get_dtype())

    def stored(self, name: str) -> Tensor:
        """A copy of `name` on the CPU, in the dtype of its file."""
        tensor: Tensor = self._handle(name).get_tensor(name)
        self.bytes_loaded += tensor.nbytes
        copy = tensor.clone()
        drop_pages(tensor)
        return copy

    def load(self, name: str, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A copy of `name`, cast."""
        return self.load_rows([name], dtype=dtype, device=device)

    def load_rows(
        self,
        names: Sequence[str],
        *,
        dtype: torch.dtype,
        device: torch.device,
        rows: Sequence[Span] | None = None,
    ) -> Tensor:
        """The tensors `names` below one another in one new tensor; see `stored_rows`."""
        return self.stored_rows(names, dtype=dtype, device=device, rows=rows).tensor()

    def stored_rows(
        self,
        names: Sequence[str],
        *,
        dtype: torch.dtype,
        device: torch.device,
        rows: Sequence[Span] | None = None,
    ) -> StoredRows:
        """The tensors `names` below one another, to be read later; they agree but in rows.

        Of all their rows together only the spans `rows`, one below the other: every part is a view
        by `get_slice`, of which only the pages asked for are ever touched.
        """
        shapes = [self.shape(name) for name in names]
        if any(shape[1:] != shapes[0][1:] for shape in shapes):
            raise InvalidCheckpoint(
                f"weights {', '.join(names)} do not fit together: their shapes are "
                f"{', '.join(map(str, shapes))}"
            )
        rows = ((0, sum(shape[0] for shape in shapes)),) if rows is None else rows
        parts = []
        for span in rows:
            first = 0
            for name, shape in zip(names, shapes, strict=True):
                start, stop = max(span[0], first), min(span[1], first + shape[0])
                if start < stop:
                    parts.append(self._handle(name).get_slice(name)[start - first : stop - first])
                first += shape[0]
        num_rows = sum(stop - start for start, stop in rows)
        if sum(map(len, parts)) != num_rows:
            raise InvalidCheckpoint(f"weights {', '.join(names)} have no rows {rows}")
        self.bytes_loaded += sum(part.nbytes for part in parts)
        return StoredRows(parts, (num_rows, *shapes[0][1:]), dtype=dtype, device=device)

    def load_columns(
        self, name: str, columns: Span, *, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """A copy of the columns `columns` of the matrix `name`, cast."""
        part = self._handle(name).get_slice(name)[:, slice(*columns)]
        self.bytes_loaded += part.nbytes
        copy = torch.empty(part.shape, dtype=dtype, device=device).copy_(part)
        drop_pages(part)
        return copy

    def _open(self, file: Path, stack: ExitStack) -> None:
        try:
            check_header(file)
            handle = stack.enter_context(safe_open(file, framework="pt"))
        except BrokenFile as error:
            raise InvalidCheckpoint(str(error)) from error
        except (SafetensorError, OSError) as error:
            reason = str(error)[:_MAX_REASON]
            raise InvalidCheckpoint(f"{file} is not a safetensors file: {reason}") from error
        self._handles[file] = handle
        for name in handle.keys():
            if (other := self._file_of.get(name)) is not None:
                raise InvalidCheckpoint(
                    f"Key {name} was found in multiple files: {other} and {file}"
                )
            if (dtype := handle.get_slice(name).get_dtype()) in _NO_WEIGHTS:
                raise InvalidCheckpoint(f"{file}: {name} has dtype {dtype}, which is not supported")
            self._file_of[name] = file

    def _handle(self, name: str) -> Any:
        if (file := self._file_of.get(name)) is None:
            raise InvalidCheckpoint(f"weight {name} does not exist in {self.folder}")
        return self._handles[file]
