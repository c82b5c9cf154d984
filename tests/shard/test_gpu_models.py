"""Every family, in every precision, on a CUDA device; `make gpu-check` runs these."""

from pathlib import Path

import pytest
import torch
from tests.fakes.quantized import quantize_folder
from tests.shard.models.parity import (
    our_logits,
    prompts,
    relative_error,
    runner_of,
    worst_difference,
)
from tests.shard.models.test_decoder import CONFIGS
from tests.shard.quantization.test_at_load import CONFIG, Save, relative
from tests.shard.quantization.test_formats import CASES, MODELS
from torch import Tensor

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

CUDA = torch.device("cuda")


def logits_on(
    device: str, folder: Path, dtype: torch.dtype = torch.float32, quantize: str | None = None
) -> Tensor:
    where = torch.device(device)
    return torch.cat(our_logits(folder, prompts(61), dtype, quantize=quantize, device=where))


@pytest.mark.parametrize("name", CONFIGS)
def test_a_family_matches_transformers_on_cuda(name: str, save_checkpoint: Save) -> None:
    folder, reference = save_checkpoint(CONFIGS[name])
    assert worst_difference(folder, reference, CUDA) < 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_family_runs_in_16_bits_on_cuda(
    name: str, dtype: torch.dtype, save_checkpoint: Save
) -> None:
    folder, reference = save_checkpoint(CONFIGS[name])
    runner = runner_of(folder, dtype, device=CUDA)
    assert relative_error(runner, reference, prompts(61)) < 0.05


@pytest.mark.parametrize("quantize", ["int8", "int4", "fp8"])
def test_weights_quantized_at_load_are_the_same_on_cuda(
    quantize: str, save_checkpoint: Save
) -> None:
    folder, _ = save_checkpoint(CONFIG)
    expected = logits_on("cpu", folder, quantize=quantize)

    # Activations that lie between two codes may be rounded to the other one.
    assert relative(logits_on("cuda", folder, quantize=quantize) - expected, expected) < 0.02


@pytest.mark.parametrize("name", CASES)
def test_a_quantized_checkpoint_is_read_the_same_on_cuda(
    name: str, save_checkpoint: Save, tmp_path: Path
) -> None:
    packer, config = CASES[name]
    folder = quantize_folder(save_checkpoint(MODELS["llama"])[0], tmp_path, packer, config)
    expected = logits_on("cpu", folder)

    assert relative(logits_on("cuda", folder) - expected, expected) < 0.02


@pytest.mark.parametrize("quantize", ["int8", "int4", "fp8"])
def test_quantized_weights_run_in_bfloat16_on_cuda(quantize: str, save_checkpoint: Save) -> None:
    folder, _ = save_checkpoint(CONFIG)
    # Both quantize the same bfloat16 matrices, so the rounding to bfloat16 does not count.
    expected = logits_on("cpu", folder, torch.bfloat16, quantize)
    seen = logits_on("cuda", folder, torch.bfloat16, quantize)

    assert relative(seen - expected, expected) < 0.1
