"""A recorded step, replayed in one call."""

import ctypes
import weakref
from collections.abc import Sequence

from torch import Tensor

from kagami_shard.backends.native.library import CBatch, CBuffer, CDecodes, COp
from kagami_shard.backends.native.packing import Packer
from kagami_shard.backends.native.runtime import Runtime


class Tape:
    """Ops over numbered buffers; the size of a step is an argument of the replay."""

    def __init__(
        self,
        runtime: Runtime,
        ops: "ctypes.Array[COp]",
        buffers: "ctypes.Array[CBuffer]",
        *,
        packer: Packer,
        tensors: Sequence[Tensor],
        alive: object,
    ) -> None:
        """The ops point to what `packer` has packed, to `tensors`, and to what is `alive`.

        Raises MemoryError, and ValueError for an op that the library does not know.
        """
        self.runtime = runtime
        self._alive = (packer, tensors, alive)
        self.weight_bytes = packer.num_bytes + sum(
            {tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values()
        )
        """What a step reads; of a table of which it reads single rows nothing"""
        library = runtime.library
        unknown = ctypes.c_int()
        self._tape = library.kg_tape_new(
            runtime.pool, ops, len(ops), buffers, len(buffers), ctypes.byref(unknown)
        )
        if unknown.value >= 0:
            raise ValueError(f"the library has no op of code {unknown.value}")
        if not self._tape:
            raise MemoryError("no memory for the threads' scratch")
        weakref.finalize(self, library.kg_tape_delete, self._tape)

    def replay(self, batch: CBatch) -> None:
        """Run the step. Raises MemoryError."""
        if self.runtime.library.kg_replay(self._tape, ctypes.byref(batch)):
            raise MemoryError(f"no memory for a step of {batch.num_tokens} tokens")

    def decode(self, decodes: CDecodes) -> int:
        """Run a step of `decodes`, how many rows gave no distribution. Raises MemoryError."""
        num_lost: int = self.runtime.library.kg_decode(self._tape, ctypes.byref(decodes))
        if num_lost < 0:
            raise MemoryError(f"no memory for a step of {decodes.batch.num_tokens} tokens")
        return num_lost
