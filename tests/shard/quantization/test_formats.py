"""Checkpoints of every format, packed by the tests' own packers, against what they stand for."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.fakes.quantized import (
    Packer,
    awq,
    fp8,
    gptq,
    int8_channels,
    packed_tensors,
    quantize_folder,
)
from tests.fakes.ranks import run_ranks
from tests.shard.models.parity import expected_logits, our_logits, prompts
from torch import Tensor
from transformers import LlamaConfig, Phi3Config, PreTrainedConfig, PreTrainedModel, Qwen2Config

from kagami_shard.quantization.select import select_scheme
from kagami_shard.quantization.source import LinearSource
from kagami_shard.weights.checkpoint import Checkpoint

Save = Callable[..., tuple[Path, PreTrainedModel]]
Config = dict[str, object]

CPU = torch.device("cpu")
# Groups of 16 do not meet the ranks' cuts of the mlp (48 / 2 = 24).
SMALL = {
    "vocab_size": 61,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPTQ: Config = {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": False}
AWQ: Config = {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm"}
FP8: Config = {"quant_method": "fp8", "activation_scheme": "static"}


def compressed(kind: str, bits: int, **more: object) -> Config:
    group = {"targets": ["Linear"], "weights": {"type": kind, "num_bits": bits}, **more}
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}


CASES: dict[str, tuple[Packer, Config]] = {
    "gptq sym": (gptq(symmetric=True), GPTQ),
    "gptq asym": (gptq(symmetric=False), GPTQ),
    "gptq act-order": (gptq(symmetric=False, act_order=True), GPTQ | {"desc_act": True}),
    "gptq v2": (gptq(symmetric=False, v2=True), GPTQ | {"checkpoint_format": "gptq_v2"}),
    "gptq whole rows": (gptq(group=-1, symmetric=True), GPTQ | {"group_size": -1}),
    "gptq 8 bits": (gptq(8, symmetric=True), GPTQ | {"bits": 8}),
    "awq": (awq(), AWQ),
    "fp8 rows": (fp8(), FP8 | {"quant_method": "fbgemm_fp8"}),
    "fp8 matrix": (fp8(per="matrix"), FP8),
    "fp8 blocks": (fp8(10, scale="weight_scale_inv"), FP8 | {"weight_block_size": [10, 10]}),
    "w4a16": (packed_tensors(symmetric=True), compressed("int", 4)),
    "w4a16 asym": (packed_tensors(symmetric=False), compressed("int", 4)),
    "w4a16 act-order": (packed_tensors(symmetric=True, act_order=True), compressed("int", 4)),
    "w8a16": (packed_tensors(8, -1, symmetric=True), compressed("int", 8)),
    "int8 a16": (int8_channels, compressed("int", 8)),
    "int8 w8a8": (int8_channels, compressed("int", 8, input_activations={"num_bits": 8})),
    "float": (fp8(), compressed("float", 8)),
}
# Their activations are rounded too, so that logits are near, not equal.
ROUNDED = {"int8 w8a8"}
EXACT = [name for name in CASES if name not in ROUNDED]
MODELS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SMALL),
    "qwen2": Qwen2Config(**SMALL),
    "phi3": Phi3Config(**SMALL),
}


def quantized(name: str, save: Save, target: Path, model: str = "llama") -> Path:
    packer, config = CASES[name]
    return quantize_folder(save(MODELS[model])[0], target, packer, config)


@torch.no_grad()
def dequantized_model(name: str, save: Save, model: str = "llama") -> PreTrainedModel:
    """transformers' model with the matrices that the packed ones stand for."""
    _, expected = save(MODELS[model])
    for parameter_name, parameter in expected.named_parameters():
        if "_proj.weight" in parameter_name:
            parameter.copy_(CASES[name][0](parameter.float())[1])
    return expected


def logits_of(model: PreTrainedModel) -> Tensor:
    return torch.cat([expected_logits(model, each) for each in prompts(61)])


def ours(folder: Path, **options: object) -> Tensor:
    return torch.cat(our_logits(folder, prompts(61), **options))  # type: ignore[arg-type]  # kwargs


@pytest.mark.parametrize("name", CASES)
def test_a_matrix_is_exactly_what_the_file_stands_for(
    name: str, save_checkpoint: Save, tmp_path: Path
) -> None:
    packer, config = CASES[name]
    folder, model = save_checkpoint(MODELS["llama"])
    quantize_folder(folder, tmp_path, packer, config)
    with Checkpoint(tmp_path) as checkpoint:
        source = LinearSource(
            checkpoint, select_scheme(config, None), dtype=torch.float32, device=CPU
        )
        for module in ("self_attn.k_proj", "mlp.down_proj"):
            weight = source.load([f"model.layers.1.{module}"])
            original = model.get_parameter(f"model.layers.1.{module}.weight")
            assert torch.equal(weight.dequantized(torch.float32), packer(original.detach())[1])


@pytest.mark.parametrize("name", EXACT)
def test_logits_are_those_of_the_dequantized_model(
    name: str, save_checkpoint: Save, tmp_path: Path
) -> None:
    folder = quantized(name, save_checkpoint, tmp_path)
    expected = logits_of(dequantized_model(name, save_checkpoint))
    assert (ours(folder) - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("name", sorted(ROUNDED))
def test_logits_are_near_where_activations_are_rounded(
    name: str, save_checkpoint: Save, tmp_path: Path
) -> None:
    folder = quantized(name, save_checkpoint, tmp_path)
    expected = logits_of(dequantized_model(name, save_checkpoint))
    assert (ours(folder) - expected).norm() < 0.05 * expected.norm()


@pytest.mark.parametrize("model", ["qwen2", "phi3"])
@pytest.mark.parametrize("name", ["gptq asym", "fp8 matrix"])
def test_biases_and_fused_matrices_are_read(
    name: str, model: str, save_checkpoint: Save, tmp_path: Path
) -> None:
    folder = quantized(name, save_checkpoint, tmp_path, model)
    expected = logits_of(dequantized_model(name, save_checkpoint, model))
    assert (ours(folder) - expected).abs().max() < 1e-4 * expected.abs().max()


@pytest.mark.parametrize("name", EXACT)
def test_two_ranks_compute_what_one_computes(
    name: str, save_checkpoint: Save, tmp_path: Path
) -> None:
    folder = quantized(name, save_checkpoint, tmp_path)
    expected = ours(folder)
    for logits in run_ranks(2, lambda group: ours(folder, parallel=group)):
        assert (logits - expected).abs().max() < 1e-4 * expected.abs().max()
