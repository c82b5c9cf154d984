"""Token ids to vectors, and vectors to logits."""

import torch
from torch import Tensor
from torch.nn.functional import embedding, linear


class Embedding:
    """Rows of a table, times a factor."""

    __slots__ = ("_multiplier", "weight")

    def __init__(self, weight: Tensor, multiplier: float = 1.0) -> None:
        self.weight = weight
        # Rounded to the weights' dtype as Gemma was trained; Granite's factor (12) is exact.
        self._multiplier = None
        if multiplier != 1.0:
            self._multiplier = torch.tensor(multiplier, dtype=weight.dtype, device=weight.device)

    def __call__(self, input_ids: Tensor) -> Tensor:
        """`[num_tokens]` to `[num_tokens, hidden]`."""
        hidden = embedding(input_ids, self.weight)
        return hidden if self._multiplier is None else hidden * self._multiplier


class Head:
    """The last matmul, `[num_rows, hidden]` to float32 logits `[num_rows, vocab_size]`."""

    __slots__ = ("_bias", "_divisor", "_softcap", "weight")

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        *,
        divisor: float = 1.0,
        softcap: float | None = None,
    ) -> None:
        self.weight = weight
        self._bias = bias
        self._divisor = divisor
        self._softcap = softcap

    def __call__(self, hidden: Tensor) -> Tensor:
        logits = linear(hidden, self.weight, self._bias).float()
        if self._divisor != 1.0:
            logits = logits / self._divisor
        if self._softcap is not None:
            logits = self._softcap * torch.tanh(logits / self._softcap)
        return logits
