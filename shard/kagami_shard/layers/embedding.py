"""Token ids to vectors, and vectors to logits."""

import torch
from torch import Tensor
from torch.nn.functional import embedding

from kagami_shard.layers.linear import Projection
from kagami_shard.machine.distributed import TensorParallel
from kagami_shard.weights.stored import Matrix, tensor_of


class Embedding:
    """Rows of a table, times a factor."""

    __slots__ = ("multiplier", "source")

    def __init__(self, weight: Matrix, multiplier: float = 1.0) -> None:
        self.source = weight
        # Rounded to the weights' dtype as Gemma was trained; Granite's factor (12) is exact.
        self.multiplier = None
        if multiplier != 1.0:
            self.multiplier = torch.tensor(multiplier, dtype=weight.dtype, device=weight.device)

    def __call__(self, input_ids: Tensor) -> Tensor:
        """`[num_tokens]` to `[num_tokens, hidden]`."""
        hidden = self._rows(input_ids)
        return hidden if self.multiplier is None else hidden * self.multiplier

    @property
    def weight(self) -> Tensor:
        return tensor_of(self.source)

    def _rows(self, input_ids: Tensor) -> Tensor:
        return embedding(input_ids, self.weight)


class ShardedEmbedding(Embedding):
    """A table cut by its rows: a rank gives those it has, zero for the others, and all are summed.

    One summand of each sum is not zero, so the sum is exact.
    """

    __slots__ = ("_first", "_parallel")

    def __init__(
        self, weight: Tensor, multiplier: float, *, first: int, parallel: TensorParallel
    ) -> None:
        """`first` is the id of the first row of `weight`."""
        super().__init__(weight, multiplier)
        self._first = first
        self._parallel = parallel

    def _rows(self, input_ids: Tensor) -> Tensor:
        local = input_ids - self._first
        is_here = (local >= 0) & (local < self.weight.shape[0])
        rows = embedding(local.where(is_here, 0), self.weight)
        return self._parallel.all_reduce(rows.masked_fill_(~is_here[:, None], 0))


class Head:
    """The last matmul, `[num_rows, hidden]` to float32 logits `[num_rows, vocab_size]`."""

    __slots__ = ("divisor", "project", "softcap", "vocab_size")

    def __init__(
        self,
        project: Projection,
        vocab_size: int,
        *,
        divisor: float = 1.0,
        softcap: float | None = None,
    ) -> None:
        self.vocab_size = vocab_size
        self.project = project
        self.divisor = divisor
        self.softcap = softcap

    def __call__(self, hidden: Tensor) -> Tensor:
        return self._finish(self.project(hidden))

    @property
    def weight_bytes(self) -> int:
        return self.project.weight_bytes

    def _finish(self, output: Tensor) -> Tensor:
        logits = output.float()
        if self.divisor != 1.0:
            logits = logits / self.divisor
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits


class ShardedHead(Head):
    """A head cut by its rows, every rank's the same number: the logits are gathered.

    All ranks then hold the same bits, and choose the same token.
    """

    __slots__ = ("_parallel",)

    def __init__(
        self,
        project: Projection,
        vocab_size: int,
        *,
        divisor: float,
        softcap: float | None,
        parallel: TensorParallel,
    ) -> None:
        """Of the ranks' rows together the first `vocab_size` count; the rest is padding."""
        super().__init__(project, vocab_size, divisor=divisor, softcap=softcap)
        self._parallel = parallel

    def __call__(self, hidden: Tensor) -> Tensor:
        output = self._parallel.all_gather(self.project(hidden))
        return self._finish(output[:, : self.vocab_size])
