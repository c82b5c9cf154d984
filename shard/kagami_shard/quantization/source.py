"""Where the decoder gets its linear layers' weights from, in whatever format they are stored."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kagami_proto.errors import InvalidCheckpoint
from kagami_shard.quantization.base import DenseWeight, Weight, on_device, stack
from kagami_shard.weights.checkpoint import Checkpoint
from kagami_shard.weights.sharding import Span
from kagami_shard.weights.stored import Matrix, StoredRows, tensor_of

Quantizer = Callable[[Tensor], Weight]
"""Makes a weight of a matrix `[out, in]`, which it may keep"""


class Format(Protocol):
    """How a quantized checkpoint keeps linear layers; modules are named without `.weight`."""

    @property
    def name(self) -> str: ...

    def shape(self, checkpoint: Checkpoint, module: str) -> tuple[int, int] | None:
        """`(out, in)` of `module`; None if it is not quantized.

        As its largest tensor says: of the others `check` takes care.
        """

    def check(self, checkpoint: Checkpoint, module: str) -> None:
        """Whether all tensors of `module`, which is quantized, fit together; raises
        `InvalidCheckpoint`.
        """

    def read(self, checkpoint: Checkpoint, module: str) -> Weight:
        """The whole weight, on the CPU."""


@dataclass(frozen=True, slots=True)
class Scheme:
    """How weights are stored in memory, and how they come there."""

    name: str = ""
    """What /info and the log say; empty: as in the checkpoint, not quantized"""
    format: Format | None = None
    quantize: Quantizer = DenseWeight
    """Of matrices that come in full precision"""
    quantize_head: Quantizer = DenseWeight
    """Of the head; as it is, it is one with a tied embedding"""


class LinearSource:
    """Reads weights by their modules' names, one matmul's at a time.

    Only that one is ever in memory in full precision beside what is kept.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        scheme: Scheme,
        *,
        dtype: torch.dtype,
        device: torch.device,
        defers: bool = False,
    ) -> None:
        """With `defers` what is kept as it is in the files is not read yet."""
        self._defers = defers
        self._checkpoint = checkpoint
        self._scheme = scheme
        self._dtype = dtype
        self._device = device

    def check(self, module: str, shape: tuple[int, int]) -> None:
        """Raises `InvalidCheckpoint` if `module` is missing, or not of `shape`, `(out, in)`."""
        format = self._scheme.format
        found = self._quantized_shape(module)
        if format is None or found is None:
            self._checkpoint.check(f"{module}.weight", shape)
            return
        if found != shape:
            raise InvalidCheckpoint(
                f"{self._checkpoint.folder}: {module}, quantized, has the shape {list(found)}, "
                f"config.json says {list(shape)}"
            )
        format.check(self._checkpoint, module)

    def is_quantized(self, module: str) -> bool:
        """Whether the checkpoint has it so."""
        return self._quantized_shape(module) is not None

    def rows(self, names: Sequence[str], rows: Sequence[Span] | None = None) -> Matrix:
        """The tensors `names` below one another, in full precision."""
        stored = self._checkpoint.stored_rows(
            names, dtype=self._dtype, device=self._device, rows=rows
        )
        return stored if self._defers else stored.tensor()

    def head_of(self, matrix: Matrix) -> Weight | StoredRows:
        """The head's weight, of one in full precision."""
        return _quantized(matrix, self._scheme.quantize_head)

    def load(
        self,
        modules: Sequence[str],
        *,
        rows: Sequence[Span] | None = None,
        columns: Span | None = None,
    ) -> Weight | StoredRows:
        """The weights of `modules` below one another; of all their rows the spans `rows` only.

        Several modules, or `rows`, or `columns` of one.
        """
        if any(self.is_quantized(module) for module in modules):
            return on_device(self._read(modules, rows, columns), self._device)
        names = [f"{module}.weight" for module in modules]
        if columns is None:
            return _quantized(self.rows(names, rows), self._scheme.quantize)
        matrix = self._checkpoint.load_columns(
            names[0], columns, dtype=self._dtype, device=self._device
        )
        return self._scheme.quantize(matrix)

    def _read(
        self, modules: Sequence[str], rows: Sequence[Span] | None, columns: Span | None
    ) -> Weight:
        weight = stack([self._read_one(module) for module in modules], self._dtype)
        if rows is not None and list(rows) != [(0, weight.shape[0])]:
            weight = weight.rows(rows)
        if columns is not None and columns != (0, weight.shape[1]):
            weight = weight.columns(columns)
        return weight

    def _read_one(self, module: str) -> Weight:
        format = self._scheme.format
        if format is None or format.shape(self._checkpoint, module) is None:
            cpu = torch.device("cpu")
            return DenseWeight(
                self._checkpoint.load(f"{module}.weight", dtype=self._dtype, device=cpu)
            )
        return format.read(self._checkpoint, module)

    def _quantized_shape(self, module: str) -> tuple[int, int] | None:
        format = self._scheme.format
        return None if format is None else format.shape(self._checkpoint, module)


def _quantized(matrix: Matrix, quantize: Quantizer) -> Weight | StoredRows:
    """Where it stays as it is, it need not be read yet."""
    if isinstance(matrix, StoredRows) and quantize is DenseWeight:
        return matrix
    return quantize(tensor_of(matrix))
