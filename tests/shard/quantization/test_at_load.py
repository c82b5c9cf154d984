"""Weights quantized as they are loaded: what they stand for, and what a model makes of them."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.fakes.ranks import run_ranks
from tests.shard.models.parity import expected_logits, our_logits, prompts
from torch import Tensor
from transformers import LlamaConfig, PreTrainedModel

from kagami_shard.backends.torch.load import load_torch
from kagami_shard.machine.device import int8_product_shape
from kagami_shard.quantization.base import Groups, quantize_activations
from kagami_shard.quantization.fp8 import quantize_fp8
from kagami_shard.quantization.int4 import quantize_int4
from kagami_shard.quantization.int8 import (
    Int8Weight,
    fitted,
    int_matmul,
    quantize_int8,
    rotated,
)

ON_CUDA = int8_product_shape(torch.device("cuda"))
Save = Callable[..., tuple[Path, PreTrainedModel]]

CONFIG = LlamaConfig(
    vocab_size=61,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
    pad_token_id=0,
)


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def relative(error: Tensor, of: Tensor) -> float:
    return float(error.norm() / of.norm())


@pytest.mark.parametrize(("columns", "block"), [(48, 16), (64, 64), (1024, 512), (33, 1)])
def test_a_rotated_block_is_as_wide_as_divides_the_columns(columns: int, block: int) -> None:
    assert quantize_int8(random(3, columns)).hadamard_block == block


def test_rotating_is_a_product_with_the_hadamard_matrix() -> None:
    matrix = random(5, 16)
    of_two = torch.tensor([[1.0, 1.0], [1.0, -1.0]])
    of_eight = torch.kron(torch.kron(of_two, of_two), of_two) / 8**0.5
    expected = torch.cat((matrix[:, :8] @ of_eight, matrix[:, 8:] @ of_eight), dim=1)
    assert torch.allclose(rotated(matrix, 8), expected, atol=1e-6)


@pytest.mark.parametrize(
    ("quantize", "bound"), [(quantize_int8, 0.01), (quantize_int4, 0.08), (quantize_fp8, 0.03)]
)
@pytest.mark.parametrize("shape", [(7, 96), (5, 33), (1, 1)])
def test_a_quantized_matrix_is_near(
    quantize: Callable[[Tensor], Int8Weight], bound: float, shape: tuple[int, int]
) -> None:
    matrix = random(*shape)
    weight = quantize(matrix)
    assert weight.shape == shape
    assert relative(weight.dequantized(torch.float32) - matrix, matrix) < bound


@pytest.mark.parametrize("quantize", [quantize_int8, quantize_int4, quantize_fp8])
def test_zeros_stay_zeros(quantize: Callable[[Tensor], Int8Weight]) -> None:
    assert not quantize(torch.zeros(4, 64)).dequantized(torch.float32).any()


def test_four_bits_give_back_what_was_in_four_bits() -> None:
    step = random(6, 2, 1).abs() / 10
    low = -step * 7.25
    codes = torch.randint(0, 16, (6, 2, 32), generator=torch.Generator().manual_seed(2))
    codes[:, :, 0], codes[:, :, 1] = 0, 15
    matrix = (low + step * codes).view(6, 64)
    error = (quantize_int4(matrix).dequantized(torch.float32) - matrix).view(6, 2, 32).abs()
    # But for the zero, which is the next fifteenth of a step.
    assert bool((error < step * (1 / 30 + 1 / 100)).all())


def test_a_large_column_of_activations_does_not_drown_the_others() -> None:
    hidden, matrix = random(4, 512), random(8, 512)
    hidden[:, 7] = 100
    expected = hidden @ matrix.T
    error, plain_error = (
        relative(weight.linear(hidden) - expected, expected)
        for weight in (quantize_int8(matrix), Int8Weight(*_plain(matrix)))
    )
    assert error < plain_error / 3


def _plain(matrix: Tensor) -> tuple[Tensor, Tensor]:
    values, scales = quantize_activations(matrix)
    return values, scales[:, 0]


@pytest.mark.parametrize("shape", [(1, 32, 8), (16, 30, 99), (17, 8, 8), (40, 31, 1)])
def test_an_8_bit_product_is_the_same_with_what_cuda_wants_around_it(
    shape: tuple[int, int, int],
) -> None:
    rows, columns, out = shape
    left, right = (torch.randint(-127, 128, (n, columns), dtype=torch.int8) for n in (rows, out))
    activations, weight = fitted(left, right, ON_CUDA)

    assert len(activations) > 16
    assert activations.shape[1] % 8 == len(weight) % 8 == 0
    assert torch.equal(
        int_matmul(activations, weight)[:rows, :out], left.float() @ right.t().float()
    )


def test_a_weight_that_cuda_takes_is_not_copied() -> None:
    right = torch.ones(16, 8, dtype=torch.int8)
    assert fitted(torch.ones(1, 8, dtype=torch.int8), right, ON_CUDA)[1] is right


def test_no_rows_give_no_rows() -> None:
    assert quantize_int8(random(8, 32)).linear(torch.empty(0, 32)).shape == (0, 8)


@pytest.mark.parametrize("quantize", [quantize_int8, quantize_int4, quantize_fp8])
@pytest.mark.parametrize("span", [(0, 32), (32, 80), (8, 41)])
def test_columns_are_cut_anywhere(
    quantize: Callable[[Tensor], Int8Weight], span: tuple[int, int]
) -> None:
    weight = quantize(random(4, 96))
    expected = weight.dequantized(torch.float32)[:, slice(*span)]
    assert relative(weight.columns(span).dequantized(torch.float32) - expected, expected) < 0.01


def test_groups_of_a_cut_are_counted_from_the_cut() -> None:
    groups, left = Groups(96, 32).columns((40, 96))
    assert left == (1, 3)
    assert groups.expand(torch.tensor([[1.0, 2.0]])).tolist() == [[1.0] * 24 + [2.0] * 32]


@pytest.mark.parametrize(("quantize", "bound"), [("int8", 0.06), ("int4", 0.5), ("fp8", 0.2)])
def test_logits_of_a_quantized_model_are_near(
    quantize: str, bound: float, save_checkpoint: Save
) -> None:
    folder, model = save_checkpoint(CONFIG)
    expected = torch.cat([expected_logits(model, each) for each in prompts(61)])
    ours = torch.cat(our_logits(folder, prompts(61), quantize=quantize))
    assert 0 < relative(ours - expected, expected) < bound


@pytest.mark.parametrize("quantize", ["int8", "int4", "fp8"])
def test_two_ranks_quantize_their_parts(quantize: str, save_checkpoint: Save) -> None:
    folder, model = save_checkpoint(CONFIG)
    expected = torch.cat([expected_logits(model, each) for each in prompts(61)])
    first, second = run_ranks(
        2,
        lambda group: torch.cat(our_logits(folder, prompts(61), parallel=group, quantize=quantize)),
    )
    assert torch.equal(first, second)
    assert relative(first - expected, expected) < 0.5


@pytest.mark.parametrize(("quantize", "name"), [(None, ""), ("eetq", "int8"), ("int4", "int4")])
def test_a_model_says_how_its_weights_are_stored(
    quantize: str | None, name: str, save_checkpoint: Save
) -> None:
    folder, _ = save_checkpoint(CONFIG)
    backend = load_torch(folder, dtype=torch.float32, device=torch.device("cpu"), quantize=quantize)
    assert backend.model.quantization == name
