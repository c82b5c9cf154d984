"""What a backend is to the engine: a loaded model and the device that computes it.

The engine admits sequences, builds batches, samples tokens and collects results. Everything that
depends on the device stands behind `Backend`. A new one (CUDA kernels, another library) is a class
with these members and a line in `select.py`; the engine does not change.

    backends/torch     the reference: runs every model, on any device
    backends/native    the C++ library of a CPU: a recorded step, replayed in one call
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from kagami_proto.values import DevicePolicy
from kagami_shard.forward.batch import ForwardBatch
from kagami_shard.forward.kv_cache import KVCache
from kagami_shard.forward.output import Output, OutputKind
from kagami_shard.models.base import Model
from kagami_shard.sampling.logprobs import Scorer


class Decodes(Protocol):
    """Greedy decodes of some sequences that feed themselves; rows are sequences.

    Each step computes one token of every row and reads it in the next step.
    """

    @property
    def table_width(self) -> int:
        """Blocks that a row has room for."""

    @property
    def sampling_ns(self) -> int:
        """The time that choosing the tokens took in the last step."""

    def grant(self, row: int, first: int, blocks: Sequence[int]) -> None:
        """Set the row's blocks from its `first` one on."""

    def run(self) -> int:
        """Compute one step; returns how many rows gave no distribution."""

    def chosen(self) -> tuple[list[int], list[float]]:
        """The last step's tokens and their logprobs, one a row; not finite: no distribution."""


class Elapsed(Protocol):
    """Measures one step on the device: forward pass, then sampling.

    The engine calls `forward_ends` and `step_ends` once each, in this order.
    """

    def forward_ends(self) -> None:
        """The forward pass was given to the device; sampling follows."""

    def step_ends(self) -> None:
        """The whole step was given to the device."""

    @property
    def is_done(self) -> bool:
        """Whether the device has finished the step, well or not. Does not wait."""

    def times(self) -> tuple[int, int]:
        """Nanoseconds of the step, and of these of the sampling. Waits for the device."""


class Recording(Protocol):
    """A step that was recorded once and is replayed in one call.

    The native tape of a CPU is one, for batches of any size. A captured CUDA graph is another, for
    decodes up to the size that it was captured for.
    """

    def takes(self, batch: ForwardBatch) -> bool:
        """Whether this recording can compute `batch`."""

    def replay(self, batch: ForwardBatch, cache: KVCache) -> Tensor:
        """Logits after the batch's selected rows, `[num_rows, vocab_size]` float32.

        They are valid until the next replay.
        """

    def decodes(
        self,
        cache: KVCache,
        last_ids: Sequence[int],
        positions: Sequence[int],
        tables: Sequence[Sequence[int]],
    ) -> Decodes:
        """Decodes that begin with token `last_ids[i]` at `positions[i]`, in blocks `tables[i]`."""


class Backend(Protocol):
    """A model on a device. One thread calls it."""

    @property
    def name(self) -> str:
        """As `Info` and the log tell it."""

    @property
    def model(self) -> Model:
        """What is known of the model."""

    @property
    def policy(self) -> DevicePolicy:
        """How the device wants to be used."""

    @property
    def device(self) -> torch.device:
        """Where the tensors of a batch are put."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the KV cache."""

    @property
    def scorer(self) -> Scorer:
        """What chooses tokens and computes logprobs from this backend's logits."""

    def pool_bytes(self) -> int:
        """Bytes that the KV cache may take, known after the largest step has run."""

    def new_cache(self, num_blocks: int, block_size: int) -> KVCache:
        """A cache for this rank's layers. Raises torch.OutOfMemoryError."""

    def run(self, batch: ForwardBatch, cache: KVCache, wanted: OutputKind) -> Output:
        """One forward pass. It may return before the device has finished.

        Raises what the device raises, and NotImplementedError for an output that this backend
        cannot give.
        """

    def carry_on(
        self,
        cache: KVCache,
        last_ids: Sequence[int],
        positions: Sequence[int],
        tables: Sequence[Sequence[int]],
    ) -> Decodes | None:
        """`Recording.decodes` where this backend has it; None: every step is a `run`."""

    def elapsed(self, started_ns: int) -> Elapsed:
        """Measure the step that the host began at `started_ns` (`time.perf_counter_ns`)."""

    def recover(self, error: Exception) -> None:
        """Make the device ready for the next step, after a step failed with `error`.

        Raises `error` again if no later step can succeed; then only a new process helps.
        """

    def upgrade(self, cache: KVCache | None) -> "Backend":
        """The backend of the steps to come: this one, or a faster one that became ready.

        Called between two steps. The other backend takes over the model's weights and `cache`.
        """
