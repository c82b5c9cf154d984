"""Who is refused, and in which words."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    NemotronConfig,
    Phi3Config,
    PhimoeConfig,
)

from kagami_proto.errors import InvalidCheckpoint, UnsupportedModel
from kagami_shard.backends.torch.load import load_torch
from kagami_shard.models.base import Model
from kagami_shard.models.families import FAMILIES
from kagami_shard.models.registry import read_config

TINY = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def load(folder: Path, **options: Any) -> Model:
    return load_torch(folder, dtype=torch.float32, device=torch.device("cpu"), **options).model


def folder_of(folder: Path, **config: object) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("model_type", ["bloom", "falcon", "mpt"])
def test_a_model_without_the_attention_interface_is_refused(
    model_type: str, tmp_path: Path
) -> None:
    AutoConfig.for_model(model_type).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match=f"model type {model_type} .*attention interface"):
        load(tmp_path)


@pytest.mark.parametrize("model_type", ["mamba", "jamba", "recurrent_gemma"])
def test_a_model_with_a_state_is_refused(model_type: str, tmp_path: Path) -> None:
    AutoConfig.for_model(model_type).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match=f"model type {model_type} .*keep a state"):
        load(tmp_path)


@pytest.mark.parametrize(("model_type", "kind"), [("lfm2", "conv"), ("llama4_text", "chunked")])
def test_a_model_with_other_layers_is_refused(model_type: str, kind: str, tmp_path: Path) -> None:
    options = {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2}
    config = AutoConfig.for_model(model_type, **(options if model_type == "lfm2" else {}))
    config.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match=f"model type {model_type} .*layers of {kind}"):
        load(tmp_path)


def test_a_model_whose_layers_swallow_keywords_is_refused(
    save_checkpoint: Callable[..., tuple],
) -> None:
    folder, _ = save_checkpoint(NemotronConfig(**TINY))
    with pytest.raises(UnsupportedModel, match=r"model type nemotron .*do not pass our keyword"):
        load(folder)


def test_a_model_that_looks_ahead_is_refused(save_checkpoint: Callable[..., tuple]) -> None:
    config = AutoConfig.for_model("bert", **TINY)
    folder, _ = save_checkpoint(config)
    with pytest.raises(UnsupportedModel, match=r"model type bert .*does not compute"):
        load(folder)


def test_an_encoder_decoder_is_refused(tmp_path: Path) -> None:
    AutoConfig.for_model("t5").save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match=r"model type t5.*encoder-decoder"):
        load(tmp_path)


def test_a_model_that_generates_no_text_is_refused(tmp_path: Path) -> None:
    AutoConfig.for_model("vit").save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match=r"model type vit .*no causal language model"):
        load(tmp_path)


def test_an_unknown_model_type_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="`kagamibara`") as raised:
        load(folder_of(tmp_path, model_type="kagamibara"))
    assert "\n" not in str(raised.value)


def test_a_bidirectional_gemma_is_refused(tmp_path: Path) -> None:
    Gemma3TextConfig(use_bidirectional_attention=True).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match=r"gemma3_text.*both directions"):
        load(tmp_path)


def test_weights_in_a_format_that_is_not_read_are_refused(tmp_path: Path) -> None:
    LlamaConfig(quantization_config={"quant_method": "hqq", "bits": 4}).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match="weights quantized by hqq are not read"):
        load(tmp_path)


def test_a_model_of_transformers_own_code_is_not_quantized(tmp_path: Path) -> None:
    GPT2Config().save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match="--quantize int8: model type gpt2"):
        load(tmp_path, quantize="int8")


def test_an_unknown_activation_is_refused(save_checkpoint: Callable[..., tuple]) -> None:
    folder, _ = save_checkpoint(LlamaConfig(**TINY, hidden_act="mish"))
    with pytest.raises(UnsupportedModel, match="activation 'mish'"):
        load(folder)


def test_an_unknown_rope_is_refused(tmp_path: Path) -> None:
    rope = {"rope_type": "proportional", "rope_theta": 1e4, "factor": 2.0}
    LlamaConfig(**TINY, rope_parameters=rope).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModel, match="rope_type 'proportional'"):
        load(tmp_path)


def test_a_missing_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidCheckpoint, match=re.escape(f"{tmp_path}/config.json")):
        load(tmp_path)


@pytest.mark.parametrize("config", [LlamaConfig(**TINY), GPT2Config()])
def test_missing_weights_are_named(config: LlamaConfig | GPT2Config, tmp_path: Path) -> None:
    config.save_pretrained(tmp_path)
    with pytest.raises(InvalidCheckpoint, match=re.escape(f"{tmp_path} has no weights")):
        load(tmp_path)


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (LlamaConfig(**TINY), "model.layers.1.self_attn.k_proj.weight"),
        (GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=32), "transformer.h.1.ln_1.weight"),
    ],
)
def test_a_missing_tensor_is_named(
    config: LlamaConfig | GPT2Config,
    name: str,
    save_checkpoint: Callable[..., tuple],
    tmp_path: Path,
) -> None:
    folder, _ = save_checkpoint(config)
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    config.save_pretrained(tmp_path)
    with pytest.raises(InvalidCheckpoint, match=f"weight {name} does not exist"):
        load(tmp_path)


def test_every_family_has_a_spec(tmp_path: Path) -> None:
    for model_type in FAMILIES:
        AutoConfig.for_model(model_type).save_pretrained(tmp_path)
        with pytest.raises(InvalidCheckpoint, match="has no weights"):
            load(tmp_path)
        assert read_config(tmp_path).model_type == model_type


def test_a_model_says_what_it_is(save_checkpoint: Callable[..., tuple]) -> None:
    folder, _ = save_checkpoint(LlamaConfig(**TINY))
    model = load(folder)
    assert model.model_type == "llama"
    assert (model.vocab_size, model.max_positions) == (32, 32)
    assert model.layers == ((1, 8, 8),) * 2


def test_longrope_is_chosen_by_the_longest_sequence(save_checkpoint: Callable[..., tuple]) -> None:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4,
    }
    config = Phi3Config(**TINY, rope_parameters=rope, original_max_position_embeddings=8)
    folder, _ = save_checkpoint(config)
    short, long = load(folder, max_length=8), load(folder)
    frequencies = [model._ropes[0].frequencies for model in (short, long)]  # type: ignore[attr-defined]
    assert torch.equal(frequencies[0], 2 * frequencies[1])


def test_transformers_longrope_stops_where_it_would_switch(
    save_checkpoint: Callable[..., tuple],
) -> None:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": [1.0] * 4,
        "long_factor": [2.0] * 4,
        "short_mscale": 1.0,
        "long_mscale": 1.0,
        "original_max_position_embeddings": 8,
    }
    folder, _ = save_checkpoint(PhimoeConfig(**TINY, num_local_experts=2, rope_parameters=rope))
    assert load(folder).max_positions == 8
