"""A recorded step, replayed in one call."""

import ctypes
import weakref
from collections.abc import Sequence

from torch import Tensor

from kagami_shard.backends.native.library import CBatch, CBuffer, CDecodes, COp, CRefusal
from kagami_shard.backends.native.packing import Packer
from kagami_shard.backends.native.runtime import Runtime

_NO_MEMORY = 1


class Tape:
    """Ops over numbered buffers; the size of a step is an argument of the replay."""

    def __init__(
        self,
        runtime: Runtime,
        ops: "ctypes.Array[COp]",
        buffers: "ctypes.Array[CBuffer]",
        *,
        vocab_size: int,
        packer: Packer,
        tensors: Sequence[Tensor],
        alive: object,
    ) -> None:
        """The ops point to what `packer` has packed, to `tensors`, and to what is `alive`.

        `vocab_size` columns are the logits of a row. Raises MemoryError, and ValueError for an op
        that the library does not know, or that would leave its buffers or its memory.
        """
        self.runtime = runtime
        self._alive = (packer, tensors, alive)
        self.weight_bytes = packer.num_bytes + sum(
            {tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values()
        )
        """What a step reads; of a table of which it reads single rows nothing"""
        library = runtime.library
        refusal = CRefusal()
        self._tape = library.kg_tape_new(
            runtime.pool, ops, len(ops), buffers, len(buffers), vocab_size, ctypes.byref(refusal)
        )
        if refusal.reason:
            code = ops[refusal.op].code
            raise ValueError(
                f"the library refuses op {refusal.op}, of code {code}: {refusal.reason.decode()}"
            )
        if not self._tape:
            raise MemoryError("no memory for the threads' scratch")
        weakref.finalize(self, library.kg_tape_delete, self._tape)

    def replay(self, batch: CBatch) -> None:
        """Run the step. Raises MemoryError, and ValueError for an id without an embedding."""
        problem = self.runtime.library.kg_replay(self._tape, ctypes.byref(batch))
        if problem:
            raise _problem(problem, batch)

    def decode(self, decodes: CDecodes) -> int:
        """Run a step of `decodes`, how many rows gave no distribution. Raises as `replay` does."""
        num_lost: int = self.runtime.library.kg_decode(self._tape, ctypes.byref(decodes))
        if num_lost < 0:
            raise _problem(-num_lost, decodes.batch)
        return num_lost


def _problem(number: int, batch: CBatch) -> Exception:
    if number == _NO_MEMORY:
        return MemoryError(f"no memory for a step of {batch.num_tokens} tokens")
    return ValueError("a token id is outside of the vocabulary")
