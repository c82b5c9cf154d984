import torch

from kagami_shard.layers.embedding import Embedding, Head
from kagami_shard.layers.linear import Linear


def test_the_multiplier_is_rounded_to_the_weights_dtype() -> None:
    weight = torch.ones(4, 2, dtype=torch.bfloat16)
    embedding = Embedding(weight, 48**0.5)
    assert torch.equal(embedding(torch.tensor([1]))[0, 0], torch.tensor(48**0.5).bfloat16())


def test_logits_are_float32_whatever_the_weights_are() -> None:
    head = Head(Linear(torch.randn(9, 4, dtype=torch.bfloat16)), 9)
    assert head(torch.randn(2, 4, dtype=torch.bfloat16)).dtype == torch.float32


def test_no_rows_give_no_logits() -> None:
    assert Head(Linear(torch.randn(9, 4)), 9)(torch.empty(0, 4)).shape == (0, 9)


def test_the_softcap_bounds_logits() -> None:
    head = Head(Linear(torch.randn(9, 4) * 100), 9, softcap=5.0, divisor=2.0)
    assert head(torch.randn(2, 4)).abs().max() <= 5.0
