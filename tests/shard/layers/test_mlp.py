import torch
from torch.nn.functional import gelu, silu

from kagami_shard.layers.linear import Linear
from kagami_shard.layers.mlp import ACTIVATIONS, MLP, GatedMLP


def test_the_gate_is_the_first_half_of_the_matmul() -> None:
    gate, up, down = torch.randn(6, 4), torch.randn(6, 4), torch.randn(4, 6)
    hidden = torch.randn(3, 4)
    mlp = GatedMLP(Linear(torch.cat([gate, up])), Linear(down), ACTIVATIONS["silu"])
    expected = (silu(hidden @ gate.T) * (hidden @ up.T)) @ down.T
    torch.testing.assert_close(mlp(hidden), expected)


def test_without_a_gate_biases_are_added() -> None:
    up, down, bias = torch.randn(6, 4), torch.randn(4, 6), torch.randn(6)
    hidden = torch.randn(3, 4)
    mlp = MLP(Linear(up, bias), Linear(down), ACTIVATIONS["gelu_pytorch_tanh"])
    expected = gelu(hidden @ up.T + bias, approximate="tanh") @ down.T
    torch.testing.assert_close(mlp(hidden), expected)
