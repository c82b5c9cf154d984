"""What a model is to the engine."""

from typing import Protocol

from torch import Tensor

from kagami_shard.forward.batch import ForwardBatch
from kagami_shard.forward.kv_cache import LayerShape
from kagami_shard.layers.attention import AttentionStep


class Model(Protocol):
    """A loaded model on its device."""

    @property
    def model_type(self) -> str:
        """As in config.json."""

    @property
    def layers(self) -> tuple[LayerShape, ...]:
        """What each attention layer keeps in the cache, in the order of its index."""

    @property
    def vocab_size(self) -> int:
        """Rows of the head."""

    @property
    def max_positions(self) -> int:
        """Longest sequence; 0 if the model knows no end."""

    @property
    def bytes_loaded(self) -> int:
        """What was read to load it, in the files' own dtype."""

    @property
    def quantization(self) -> str:
        """How the weights are kept: "int8", "gptq", …; empty if they are not quantized."""

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights that a step reads: all but tables of which it reads single rows.

        Of a mixture of experts all experts count.
        """

    def forward(self, batch: ForwardBatch, attend: AttentionStep) -> Tensor:
        """Logits after `batch.logits_rows`: `[num_rows, vocab_size]` float32."""
