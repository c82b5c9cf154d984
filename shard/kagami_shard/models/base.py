"""What is known of a loaded model; how it is computed is its backend's business."""

from typing import Protocol

from kagami_shard.forward.kv_cache import LayerShape


class Model(Protocol):
    """The facts of a loaded model."""

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

        A mixture of experts counts all its experts.
        """
