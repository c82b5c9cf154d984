"""The feed-forward half of a layer, gated (arXiv:2002.05202) or not."""

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType

from torch import Tensor
from torch.nn.functional import gelu, relu, silu

from kagami_shard.layers.linear import Projection

Activation = Callable[[Tensor], Tensor]

_tanh_gelu = partial(gelu, approximate="tanh")

# By the name in config.json.
ACTIVATIONS: Mapping[str, Activation] = MappingProxyType(
    {
        "silu": silu,
        "swish": silu,
        "gelu": gelu,
        "gelu_new": _tanh_gelu,
        "gelu_fast": _tanh_gelu,
        "gelu_pytorch_tanh": _tanh_gelu,
        "relu": relu,
    }
)


class GatedMLP:
    """`down(activation(gate) * up)`; gate and up are the two halves of one matmul."""

    __slots__ = ("activation", "down", "gate_up")

    def __init__(self, gate_up: Projection, down: Projection, activation: Activation) -> None:
        self.gate_up = gate_up
        self.down = down
        self.activation = activation

    def __call__(self, hidden: Tensor) -> Tensor:
        gate, up = self.gate_up(hidden).chunk(2, dim=-1)
        return self.down(self.activation(gate) * up)

    @property
    def weight_bytes(self) -> int:
        return self.gate_up.weight_bytes + self.down.weight_bytes


class MLP:
    """`down(activation(up))`."""

    __slots__ = ("activation", "down", "up")

    def __init__(self, up: Projection, down: Projection, activation: Activation) -> None:
        self.up = up
        self.down = down
        self.activation = activation

    def __call__(self, hidden: Tensor) -> Tensor:
        return self.down(self.activation(self.up(hidden)))

    @property
    def weight_bytes(self) -> int:
        return self.up.weight_bytes + self.down.weight_bytes
