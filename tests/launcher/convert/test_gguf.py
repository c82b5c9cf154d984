"""A tiny model is written as GGUF, in llama.cpp's layout, and must come back as it was."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from gguf import quants
from safetensors import safe_open
from tokenizers import Tokenizer

from kagami_launcher.convert import gguf_families as converter
from kagami_launcher.convert.files import ConversionRefused
from kagami_launcher.convert.gguf_families import FAMILIES, checkpoint_name
from kagami_launcher.convert.gguf_file import open_file
from kagami_launcher.convert.gguf_tokenizer import Metadata, build_tokenizer
from kagami_launcher.convert.run import Task
from kagami_launcher.convert.run import convert as run_task

LLAMA = FAMILIES["llama"]
HEADS, KV_HEADS, HIDDEN, INNER, LAYERS = 4, 2, 32, 64, 2
PLAIN = [*"abcdefghijklmnopqrstuvwxyz0123456789Ġ.,?'Ċ", "th", "the", "Ġthe", "12"]
TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *PLAIN]
MERGES = ["t h", "th e", "Ġ the", "1 2"]
Q4, Q8 = gguf.GGMLQuantizationType.Q4_1, gguf.GGMLQuantizationType.Q8_0


def convert(source: Path, destination: Path) -> None:
    run_task(Task(source, destination))


def permute(weight: Any, heads: int) -> Any:
    """llama.cpp's own: convert_hf_to_gguf.py, LlamaModel.permute."""
    shape = weight.shape
    return (
        weight.reshape(heads, 2, shape[0] // heads // 2, *shape[1:]).swapaxes(1, 2).reshape(shape)
    )


def rows(random: np.random.Generator, *shape: int) -> Any:
    return random.standard_normal(shape).astype(np.float32)


def tiny_weights() -> dict[str, Any]:
    """Name in the GGUF -> weight in a checkpoint's layout."""
    random = np.random.default_rng(0)
    kv = HIDDEN // HEADS * KV_HEADS
    weights = {"token_embd": rows(random, len(TOKENS), HIDDEN), "output_norm": rows(random, HIDDEN)}
    shapes = {
        "attn_norm": (HIDDEN,),
        "attn_q": (HIDDEN, HIDDEN),
        "attn_k": (kv, HIDDEN),
        "attn_v": (kv, HIDDEN),
        "attn_output": (HIDDEN, HIDDEN),
        "ffn_norm": (HIDDEN,),
        "ffn_gate": (INNER, HIDDEN),
        "ffn_up": (INNER, HIDDEN),
        "ffn_down": (HIDDEN, INNER),
    }
    for layer in range(LAYERS):
        for name, shape in shapes.items():
            weights[f"blk.{layer}.{name}"] = rows(random, *shape)
    return weights


def write_gguf(
    path: Path, *, architecture: str = "llama", pre: str = "smollm", **extra: Any
) -> Path:
    """The tiny model as a file; `extra` are tensors by name, with dots as `__`."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(100000.0)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 3] + [1] * len(PLAIN))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{{ messages[0]['content'] }}")
    for name, weight in tiny_weights().items():
        if ".attn_q" in name:
            weight = permute(weight, HEADS)
        if ".attn_k" in name:
            weight = permute(weight, KV_HEADS)
        kind = Q4 if ".ffn_" in name and weight.ndim == 2 else Q8
        if weight.ndim == 1:
            writer.add_tensor(name + ".weight", weight)
        else:
            writer.add_tensor(name + ".weight", quants.quantize(weight, kind), raw_dtype=kind)
    for name, weight in extra.items():
        writer.add_tensor(name.replace("__", "."), weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("convert")
    destination = base / "models--kagami--tiny" / "snapshots" / "key"
    convert(write_gguf(base / "tiny.gguf"), destination)
    return destination


def stored(folder: Path) -> dict[str, Any]:
    """Every tensor, its bfloat16 widened to float32."""
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name).float().numpy() for name in file.keys()}


def as_bfloat16(weight: Any) -> Any:
    import torch

    return torch.from_numpy(weight).bfloat16().float().numpy()


def test_every_tensor_is_the_dequantized_one_in_bfloat16(folder: Path) -> None:
    found = stored(folder)
    for name, weight in tiny_weights().items():
        if weight.ndim == 2:  # rows are quantized one by one: permuting commutes with it
            kind = Q4 if ".ffn_" in name else Q8
            weight = quants.dequantize(quants.quantize(weight, kind), kind).reshape(weight.shape)
        expected = as_bfloat16(weight)
        np.testing.assert_array_equal(found.pop(checkpoint_name(name + ".weight", LLAMA)), expected)
    assert not found  # nothing else, in particular no lm_head


def test_the_config_is_a_llamas(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["rms_norm_eps"] == 1e-05
    assert config["rope_theta"] == 100000.0
    assert config["max_position_embeddings"] == 128
    assert config["vocab_size"] == len(TOKENS)
    assert config["tie_word_embeddings"] is True
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (HEADS, KV_HEADS)


def test_a_generation_ends_at_every_end_token(folder: Path) -> None:
    config = json.loads((folder / "generation_config.json").read_text())
    assert config == {"bos_token_id": 1, "eos_token_id": [2, 0], "pad_token_id": 2}


def test_the_chat_template_is_a_file(folder: Path) -> None:
    assert (folder / "chat_template.jinja").read_text() == "{{ messages[0]['content'] }}"


def test_smollms_tokenizer_splits_digits(folder: Path) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert tokenizer.encode("the 12 the").tokens == ["the", "Ġ", "1", "2", "Ġthe"]
    assert tokenizer.encode("<|im_start|>the<|im_end|>").ids == [1, TOKENS.index("the"), 2]
    assert tokenizer.decode(tokenizer.encode("the 12?").ids) == "the 12?"


def test_gpt2s_tokenizer_does_not(tmp_path: Path) -> None:
    metadata = Metadata(open_file(write_gguf(tmp_path / "a.gguf", pre="gpt-2")).values)
    assert build_tokenizer(metadata).encode("12").tokens == ["12"]


@pytest.mark.slow
def test_transformers_loads_the_folder(folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    ids = tokenizer("the 12", return_tensors="pt")
    assert model.generate(**ids, max_new_tokens=2).shape[1] <= ids.input_ids.shape[1] + 2
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    message = [{"role": "user", "content": "the"}]
    assert tokenizer.apply_chat_template(message, tokenize=False) == "the"
    assert (tokenizer.eos_token, tokenizer.bos_token) == ("<|im_end|>", "<|im_start|>")


@pytest.mark.parametrize(
    ("make", "why"),
    [
        ({"architecture": "gemma3"}, "GGUF architecture `gemma3` is not supported yet, only llama"),
        ({"pre": "tekken"}, "pre-tokenizer `tekken` is not supported yet"),
        ({"blk__0__surprise__weight": np.zeros(4, np.float32)}, "`blk.0.surprise.weight` has no"),
        ({"rope_freqs__weight": np.full(4, 3.3, np.float32)}, "not the scaling of Llama 3"),
    ],
)
def test_what_cannot_be_converted_is_refused_by_name(
    tmp_path: Path, make: dict[str, Any], why: str
) -> None:
    destination = tmp_path / "m" / "snapshots" / "key"
    with pytest.raises(ConversionRefused, match=why):
        convert(write_gguf(tmp_path / "a.gguf", **make), destination)
    assert not destination.exists()
    assert not list((tmp_path / "m").glob(".incomplete*"))


def test_llama_3s_rope_scaling_is_read_from_its_tensor(tmp_path: Path) -> None:
    scaling = {**converter._LLAMA3_SCALING, "factor": 32.0}
    factors = converter.llama3_factors(scaling, 100000.0, HIDDEN // HEADS).astype(np.float32)
    file = open_file(write_gguf(tmp_path / "a.gguf", rope_freqs__weight=factors))
    config = converter.model_config(Metadata(file.values), file.tensors, LLAMA)
    assert config["rope_scaling"] == scaling


@pytest.mark.slow
def test_llama_3s_factors_are_those_of_transformers() -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {**converter._LLAMA3_SCALING, "factor": 32.0, "rope_theta": 500000.0}
    config = LlamaConfig(hidden_size=256, num_attention_heads=4, rope_parameters=scaling)
    theirs, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 500000.0 ** -(np.arange(0, 64, 2) / 64)
    ours = plain / converter.llama3_factors(scaling, 500000.0, 64)
    np.testing.assert_allclose(theirs.numpy(), ours, rtol=1e-4)


def run_child(source: Path, destination: Path) -> subprocess.Popen[str]:
    argv = [
        sys.executable,
        "-P",
        "-m",
        "kagami_launcher.convert",
        str(source),
        str(destination),
    ]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)


def test_two_conversions_at_once_make_one_folder(tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "a.gguf")
    destination = tmp_path / "m" / "snapshots" / "key"
    children = [run_child(source, destination) for _ in range(2)]
    said = [child.communicate(timeout=60)[0] for child in children]
    assert [child.returncode for child in children] == [0, 0]
    assert "".join(said).count("Convert: [1/1] -- Took: 0:00:0") == 2  # message and fields.message
    assert sorted(os.listdir(tmp_path / "m")) == [".convert.lock", "snapshots"]
    assert len(stored(destination)) == 2 + 9 * LAYERS


def test_a_leftover_of_a_killed_conversion_is_cleared(tmp_path: Path) -> None:
    (tmp_path / "m" / ".incomplete-key").mkdir(parents=True)
    (tmp_path / "m" / ".incomplete-key" / "model.safetensors").write_bytes(b"half")
    convert(write_gguf(tmp_path / "a.gguf"), tmp_path / "m" / "snapshots" / "key")
    assert len(stored(tmp_path / "m" / "snapshots" / "key")) == 2 + 9 * LAYERS


@pytest.mark.parametrize(
    "content", [b"", b"no gguf at all, but long enough to be read as a header"]
)
def test_a_broken_file_is_one_error_line(tmp_path: Path, content: bytes) -> None:
    source = tmp_path / "broken.gguf"
    source.write_bytes(content)
    child = run_child(source, tmp_path / "m" / "snapshots" / "key")
    said = child.communicate(timeout=60)[0]
    assert child.returncode == 1
    assert json.loads(said)["level"] == "ERROR"
    assert f"Cannot convert {source}: " in said


def test_a_truncated_file_is_one_error_line(tmp_path: Path) -> None:
    whole = write_gguf(tmp_path / "a.gguf").read_bytes()
    source = tmp_path / "half.gguf"
    source.write_bytes(whole[: len(whole) // 2])
    child = run_child(source, tmp_path / "m" / "snapshots" / "key")
    said = child.communicate(timeout=60)[0]
    assert (child.returncode, said.count("\n")) == (1, 1)
