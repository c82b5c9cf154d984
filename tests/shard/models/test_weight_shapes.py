"""A tensor of another shape than config.json says is refused by its name, however it is loaded."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.fakes.model_folders import CONFIG, tensors, write_model
from tests.fakes.ranks import run_ranks
from tests.shard.hostile_loads import KINDS

from kagami_proto.errors import InvalidCheckpoint, KagamiError
from kagami_shard.backends.torch.load import load_torch
from kagami_shard.machine.distributed import TensorParallel

# name -> a shape that it must not have
WRONG: list[tuple[str, tuple[int, ...]]] = [
    ("model.embed_tokens.weight", (5, 32)),
    ("model.embed_tokens.weight", (40, 31)),
    ("model.embed_tokens.weight", (40,)),
    ("lm_head.weight", (100, 32)),
    ("lm_head.weight", (40, 64)),
    ("model.norm.weight", (1,)),
    ("model.norm.weight", (33,)),
    ("model.norm.weight", (32, 1)),
    ("model.norm.weight", ()),
    ("model.layers.0.input_layernorm.weight", (31,)),
    ("model.layers.1.post_attention_layernorm.weight", (64,)),
    ("model.layers.0.self_attn.q_proj.weight", (32, 33)),
    ("model.layers.0.self_attn.q_proj.weight", (16, 32)),
    ("model.layers.0.self_attn.k_proj.weight", (32, 32)),
    ("model.layers.1.self_attn.v_proj.weight", (16, 31)),
    ("model.layers.0.self_attn.o_proj.weight", (60, 64)),
    ("model.layers.1.self_attn.o_proj.weight", (32, 0)),
    ("model.layers.0.mlp.gate_proj.weight", (48, 33)),
    ("model.layers.0.mlp.up_proj.weight", (47, 32)),
    ("model.layers.0.mlp.down_proj.weight", (50_000, 1)),
    ("model.layers.1.mlp.down_proj.weight", (32, 47)),
    ("model.layers.1.mlp.down_proj.weight", (32, 48, 1)),
]
LOADING: dict[str, dict[str, Any]] = {
    "float32": {"dtype": torch.float32},
    "bfloat16": {"dtype": torch.bfloat16},
    "packed from the files": {"dtype": torch.bfloat16, "defers": True},
    "int8": {"dtype": torch.bfloat16, "quantize": "int8"},
    "int4": {"dtype": torch.bfloat16, "quantize": "int4"},
    "fp8": {"dtype": torch.bfloat16, "quantize": "fp8"},
}


def load(folder: Path, **options: Any) -> None:
    load_torch(folder, device=torch.device("cpu"), **options)


@pytest.mark.parametrize("way", LOADING)
def test_a_sound_model_is_loaded(way: str, tmp_path: Path) -> None:
    load(write_model(tmp_path), **LOADING[way])


@pytest.mark.parametrize("way", LOADING)
@pytest.mark.parametrize(("name", "shape"), WRONG)
def test_a_wrong_shape_is_refused_by_name(
    name: str, shape: tuple[int, ...], way: str, tmp_path: Path
) -> None:
    write_model(tmp_path, weights=tensors() | {name: torch.zeros(shape)})
    right = list(tensors()[name].shape)
    words = f"{tmp_path}/model.safetensors: {name} has the shape {list(shape)}, "
    with pytest.raises(InvalidCheckpoint, match=re.escape(f"{words}config.json says {right}")):
        load(tmp_path, **LOADING[way])


@pytest.mark.parametrize(("name", "shape"), WRONG[::4])
def test_every_rank_refuses_before_it_waits_for_the_others(
    name: str, shape: tuple[int, ...], tmp_path: Path
) -> None:
    write_model(tmp_path, weights=tensors() | {name: torch.zeros(shape)})

    def refusal(group: TensorParallel) -> str:
        with pytest.raises(InvalidCheckpoint) as raised:
            load(tmp_path, dtype=torch.float32, parallel=group)
        return str(raised.value)

    words = f"{name} has the shape {list(shape)}"
    assert [words in text for text in run_ranks(2, refusal)] == [True, True]


@pytest.mark.parametrize("kind", ["gptq", "awq", "compressed-tensors", "fp8"])
def test_the_tensors_of_a_quantized_matrix_must_fit_it(kind: str, tmp_path: Path) -> None:
    config, weights = KINDS[kind][0]()
    module = "model.layers.1.mlp.down_proj."
    parts = [name for name in weights if name.startswith(module) and "input_scale" not in name]
    assert len(parts) >= 2
    for name in parts:
        for dimension in range(weights[name].ndim):
            wrong = weights[name].repeat_interleave(2, dimension)
            write_model(tmp_path, config, weights | {name: wrong})
            with pytest.raises(KagamiError, match=re.escape(module.removesuffix("."))):
                load(tmp_path, dtype=torch.bfloat16)


@pytest.mark.parametrize("kind", ["gptq", "compressed-tensors"])
@pytest.mark.parametrize("group", [-1, 3, 2**31 - 1])
def test_a_column_of_a_group_that_is_not_there_is_refused(
    group: int, kind: str, tmp_path: Path
) -> None:
    config, weights = KINDS[kind][0]()
    name = next(name for name in weights if name.endswith("g_idx"))
    changed = weights[name].clone()
    changed[5] = group
    write_model(tmp_path, config, weights | {name: changed})
    with pytest.raises(InvalidCheckpoint, match=f"{re.escape(name)} .* names groups"):
        load(tmp_path, dtype=torch.bfloat16)


@pytest.mark.parametrize("size", [0, -2, 2**40, "16", 1.5, True])
@pytest.mark.parametrize("kind", ["gptq", "awq"])
def test_a_group_size_that_is_none_is_refused(size: object, kind: str, tmp_path: Path) -> None:
    config, weights = KINDS[kind][0]()
    config["quantization_config"] = config["quantization_config"] | {"group_size": size}
    write_model(tmp_path, config, weights)
    with pytest.raises(KagamiError, match="group_size"):
        load(tmp_path, dtype=torch.bfloat16)


def test_tensors_that_agree_with_each_other_must_agree_with_the_config(tmp_path: Path) -> None:
    weights = tensors()
    for name in ("gate_proj", "up_proj"):
        weights[f"model.layers.0.mlp.{name}.weight"] = torch.zeros(64, 32)
    weights["model.layers.0.mlp.down_proj.weight"] = torch.zeros(32, 64)
    write_model(tmp_path, weights=weights)
    with pytest.raises(InvalidCheckpoint, match=r"gate_proj.* \[64, 32\], .* \[48, 32\]"):
        load(tmp_path, dtype=torch.float32)


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.bool, torch.int64])
def test_a_weight_that_is_no_float_is_refused(dtype: torch.dtype, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    write_model(tmp_path, weights=tensors() | {name: torch.zeros(48, 32, dtype=dtype)})
    with pytest.raises(InvalidCheckpoint, match=f"{name} is [A-Z]+[0-9]*, only float"):
        load(tmp_path, dtype=torch.float32)


def test_a_layer_too_many_in_the_config_is_a_missing_weight(tmp_path: Path) -> None:
    write_model(tmp_path, CONFIG | {"num_hidden_layers": 3})
    with pytest.raises(InvalidCheckpoint, match=r"weight model\.layers\.2\..* does not exist"):
        load(tmp_path, dtype=torch.float32)


def test_nothing_is_read_before_all_shapes_are_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_model(tmp_path, weights=tensors() | {"lm_head.weight": torch.zeros(100, 32)})
    reads: list[object] = []
    monkeypatch.setattr(
        "kagami_shard.weights.checkpoint.Checkpoint.stored_rows",
        lambda *arguments, **options: reads.append(arguments),
    )
    with pytest.raises(InvalidCheckpoint, match=r"lm_head\.weight"):
        load(tmp_path, dtype=torch.float32)
    assert reads == []
