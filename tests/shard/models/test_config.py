"""A config.json that is read as it is says what transformers makes of it."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from kagami_proto.errors import UnsupportedModel
from kagami_shard.models.config import plain_config
from kagami_shard.models.families import FAMILIES
from kagami_shard.models.registry import read_config

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 96,
    "max_position_embeddings": 128,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e5,
    "tie_word_embeddings": True,
    "vocab_size": 32,
}
MISTRAL = LLAMA | {"model_type": "mistral", "sliding_window": 16}
ROPE = {"rope_theta": 2e4, "rope_type": "default"}
PRESENT = {name: value for name, value in LLAMA.items() if name != "rope_theta"}


def written(folder: Path, config: dict[str, Any]) -> None:
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    "config",
    [
        LLAMA,
        LLAMA | {"attention_bias": True, "mlp_bias": True, "head_dim": 32},
        LLAMA | {"head_dim": None, "rope_scaling": None, "hidden_act": "gelu"},
        PRESENT | {"rope_parameters": ROPE},
        MISTRAL,
        MISTRAL | {"sliding_window": None, "head_dim": 32},
    ],
)
def test_a_plain_config_makes_the_spec_that_transformers_makes(
    config: dict[str, Any], tmp_path: Path
) -> None:
    written(tmp_path, config)
    plain = plain_config(config)
    spec_of = FAMILIES[str(config["model_type"])]
    assert spec_of(plain, 0) == spec_of(AutoConfig.from_pretrained(tmp_path), 0)


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "qwen2"},
        {"hidden_size": "64"},
        {"rms_norm_eps": None},
        {"mlp_bias": "no"},
        {"rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
        {"auto_map": {"AutoConfig": "configuration.Own"}},
        {"is_encoder_decoder": True},
        {"layer_types": ["full_attention"] * 2},
    ],
)
def test_anything_else_is_left_to_transformers(change: dict[str, Any]) -> None:
    assert plain_config(LLAMA | change) is None


@pytest.mark.parametrize("name", ["num_key_value_heads", "tie_word_embeddings", "rope_theta"])
def test_a_field_that_is_missing_is_left_to_transformers(name: str) -> None:
    assert plain_config({key: value for key, value in LLAMA.items() if key != name}) is None


def test_a_mistral_that_does_not_tell_its_window_is_left_to_transformers() -> None:
    assert plain_config(LLAMA | {"model_type": "mistral"}) is None


def test_what_a_plain_config_lacks_is_no_attribute(tmp_path: Path) -> None:
    written(tmp_path, LLAMA)
    config = read_config(tmp_path)
    assert not hasattr(config, "quantization_config")


def test_a_config_that_transformers_cannot_read_is_an_error_and_no_dump(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    config = LLAMA | {"model_type": "falcon", "head_dim": 16}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModel, match="head_dim"):
        read_config(tmp_path)
    assert "hidden_size" not in "".join((*capfd.readouterr(), caplog.text))
