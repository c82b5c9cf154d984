"""What a forward pass gives back."""

import enum
from typing import NamedTuple

from torch import Tensor


class OutputKind(enum.Flag):
    """What is computed of the batch's selected rows, `ForwardBatch.selected_rows`."""

    LOGITS = enum.auto()
    VECTORS = enum.auto()


class Output(NamedTuple):
    """Of each selected row, in order; None: it was not wanted.

    A backend may use the memory again in the next step.
    """

    logits: Tensor | None = None
    """`[num_rows, vocab_size]` float32"""
    vectors: Tensor | None = None
    """`[num_rows, hidden]` float32: what the head reads, behind the last norm"""
