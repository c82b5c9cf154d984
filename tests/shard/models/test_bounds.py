"""A number in config.json that is none, or beyond its bounds, is refused by its field's name."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.fakes.model_folders import CONFIG, write_model

from kagami_proto.errors import InvalidCheckpoint, KagamiError
from kagami_shard.backends.torch.load import load_torch
from kagami_shard.models.bounds import check_bounds
from kagami_shard.models.registry import read_config

NAN, INFINITY = float("nan"), float("inf")
FIELDS: list[tuple[str, object]] = [
    *(("num_hidden_layers", value) for value in (0, -1, 10**6, 2**31, 2**63, 10**40, 1.5, "2")),
    *(("hidden_size", value) for value in (0, -32, 10**9, NAN, True, {})),
    *(("intermediate_size", value) for value in (-1, 2**40, INFINITY)),
    *(("num_attention_heads", value) for value in (0, -4, 10**6)),
    *(("num_key_value_heads", value) for value in (0, -1, 2**33)),
    *(("head_dim", value) for value in (-8, 2**20, "8")),
    *(("vocab_size", value) for value in (0, -1, 2**31, 2**62)),
    *(("max_position_embeddings", value) for value in (0, -1, 2**62, NAN)),
    *(("rms_norm_eps", value) for value in (NAN, INFINITY, -1.0, "small")),
    *(("rope_theta", value) for value in (NAN, INFINITY, 0, -1e4, 10**400, "10000")),
    *(("logits_scaling", value) for value in (0, NAN)),
]


@pytest.mark.parametrize(("name", "value"), FIELDS)
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "gpt_neox"])
def test_a_number_out_of_bounds_is_refused_by_name(
    model_type: str, name: str, value: object, tmp_path: Path
) -> None:
    write_model(tmp_path, CONFIG | {"model_type": model_type, name: value})
    with pytest.raises(InvalidCheckpoint) as raised:
        read_config(tmp_path)
    text = str(raised.value)
    assert text.startswith(f"{tmp_path}/config.json: {name} must be a ") or "huge" in text
    assert "\n" not in text
    assert len(text) < 300


@pytest.mark.parametrize("path", ["text_config", "text_config.text_config"])
def test_a_config_within_a_config_has_the_same_bounds(path: str, tmp_path: Path) -> None:
    config: dict[str, Any] = {"num_hidden_layers": 10**6}
    for name in reversed(path.split(".")):
        config = {name: config}
    with pytest.raises(InvalidCheckpoint, match=re.escape(f"{path}.num_hidden_layers")):
        check_bounds(config, tmp_path / "config.json")


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": NAN},
        {"rope_type": "linear", "factor": 0.0},
        {"rope_type": "linear"},
        {"rope_type": "dynamic", "factor": -INFINITY},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 0},
        {"rope_type": "yarn", "factor": 4.0, "attention_factor": INFINITY},
        {"rope_type": "llama3", "factor": 8.0},
        {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0], "factor": 2.0},
        {"rope_type": "longrope", "short_factor": [0.0] * 4, "long_factor": [0.0] * 4},
        {"rope_type": ["linear"], "factor": 2.0},
        {"rope_type": None},
        [1, 2],
        "linear",
        7,
    ],
)
def test_a_rope_that_makes_no_frequencies_is_refused(rope: object, tmp_path: Path) -> None:
    write_model(tmp_path, CONFIG | {"rope_scaling": rope})
    with pytest.raises(KagamiError) as raised:
        load_torch(tmp_path, dtype=torch.float32, device=torch.device("cpu"))
    assert "\n" not in str(raised.value)
    assert "rope_" in str(raised.value)


@pytest.mark.parametrize(
    "change",
    [
        {"num_attention_heads": 4, "num_key_value_heads": 3},
        {"num_attention_heads": 3, "num_key_value_heads": 3},
        {"head_dim": 7},
        {"hidden_size": 3},
        {"head_dim": 1},
        {"model_type": "mistral", "sliding_window": 0},
        {"model_type": "mistral", "sliding_window": -4},
        {"model_type": "mistral", "sliding_window": True},
        {"model_type": "mistral", "sliding_window": 2**32 + 5},
        {"model_type": "qwen3", "layer_types": ["full_attention"] * 3},
        {"model_type": "gemma2", "query_pre_attn_scalar": None},
    ],
)
def test_numbers_that_contradict_each_other_are_refused(
    change: dict[str, Any], tmp_path: Path
) -> None:
    write_model(tmp_path, CONFIG | change)
    with pytest.raises(KagamiError) as raised:
        load_torch(tmp_path, dtype=torch.float32, device=torch.device("cpu"))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "7",
        "{",
        "\x00",
        "[" * 100_000,
        '{"a":' * 100_000,
        '{"num_hidden_layers": 1' + "0" * 5000,
    ],
    ids=range(8),
)
def test_a_file_that_is_no_object_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(InvalidCheckpoint, match=re.escape(f"{tmp_path}/config.json")) as raised:
        read_config(tmp_path)
    assert len(str(raised.value)) < 300


def test_a_file_of_gigabytes_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(InvalidCheckpoint, match="1099511627776 bytes"):
        read_config(tmp_path)


def test_what_published_models_say_is_within_bounds(tmp_path: Path) -> None:
    llama_405b = {
        "hidden_size": 16384,
        "intermediate_size": 53248,
        "num_hidden_layers": 126,
        "num_attention_heads": 128,
        "vocab_size": 128256,
        "rope_theta": 500000.0,
    }
    scout = {"text_config": {"max_position_embeddings": 10485760, "rope_theta": 500000.0}}
    gemma = {
        "text_config": {
            "vocab_size": 262208,
            "query_pre_attn_scalar": 168,
            "attn_logit_softcapping": None,
        }
    }
    layerwise = {"num_key_value_heads": [3, 3, 5], "intermediate_size": [64, None, 128]}
    for config in (llama_405b, scout, gemma, layerwise, {}):
        check_bounds(json.loads(json.dumps(config)), tmp_path / "config.json")
