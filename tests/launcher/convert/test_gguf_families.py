"""Each family's model is written as llama.cpp writes it, converted, and says the same again."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import quants
from tests.launcher.convert.test_gguf import TOKENS, permute
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from kagami_launcher.convert.files import ConversionRefused
from kagami_launcher.convert.gguf_families import FAMILIES
from kagami_launcher.convert.run import Task, convert

HEADS, KV_HEADS, LAYERS, WINDOW = 4, 2, 2, 8
SIZES = {
    "vocab_size": len(TOKENS),
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
DIFFERENCES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": False, "rms_norm_eps": 1e-5},
    "qwen2": {"tie_word_embeddings": True, "rms_norm_eps": 1e-6},
    "qwen3": {"tie_word_embeddings": False, "head_dim": 16, "rms_norm_eps": 1e-6},
    "phi3": {"sliding_window": WINDOW, "rms_norm_eps": 1e-5},
    "gemma2": {
        "head_dim": 16,
        "query_pre_attn_scalar": 16,
        "sliding_window": WINDOW,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 3.0,
    },
}


def random_model(family: str) -> PreTrainedModel:
    """Weights large enough that soft caps, biases and norms matter; all are bfloat16 numbers."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SIZES, **DIFFERENCES[family])
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    for name, weight in model.named_parameters():
        noise = torch.randn_like(weight) * 0.3
        is_plain_norm = "norm" in name and family != "gemma2"
        weight.data = (noise + 1 if is_plain_norm else noise).bfloat16().float()
    return model.eval()


def write_gguf(path: Path, model: PreTrainedModel) -> Path:
    """As llama.cpp's convert_hf_to_gguf.py does it; tensor names are the gguf package's own."""
    config, family = model.config, model.config.model_type
    writer = gguf.GGUFWriter(path, family)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // HEADS
    if family in ("qwen3", "gemma2"):
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if family in ("llama", "phi3"):
        writer.add_rope_dimension_count(head_dim)
    if family != "gemma2":
        writer.add_rope_freq_base(10000.0)
    if family in ("phi3", "gemma2"):
        writer.add_sliding_window(config.sliding_window)
    if family == "gemma2":
        writer.add_attn_logit_softcapping(config.attn_logit_softcapping)
        writer.add_final_logit_softcapping(config.final_logit_softcapping)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 3, 3] + [1] * (len(TOKENS) - 3))
    writer.add_token_merges(["t h"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[family.upper()], LAYERS)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        weight = tensor.numpy()
        if family == "llama" and ".q_proj." in name:
            weight = permute(weight, HEADS)
        if family == "llama" and ".k_proj." in name:
            weight = permute(weight, KV_HEADS)
        if family == "gemma2" and name.endswith("norm.weight"):
            weight = weight + 1
        writer.add_tensor(names.get_name(name, (".weight", ".bias")), weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def converted(source: Path) -> Path:
    folder = source.parent / "hub" / "models--kagami--m" / "snapshots" / "key"
    convert(Task(source, folder))
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_the_converted_model_says_what_the_original_does(tmp_path: Path, family: str) -> None:
    theirs = random_model(family)
    folder = converted(write_gguf(tmp_path / "m.gguf", theirs))
    ours = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    assert ours.config.architectures == [type(theirs).__name__]
    for name, weight in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], weight, rtol=0, atol=0)
    ids = torch.randint(3, len(TOKENS), (1, 3 * WINDOW))
    with torch.inference_mode():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", quants._type_traits, ids=lambda kind: kind.name)
def test_every_type_that_gguf_can_read_is_converted(tmp_path: Path, kind: Any) -> None:
    block, size = gguf.GGML_QUANT_SIZES[kind]
    source = np.random.default_rng(0)
    # Small bytes: scales that are finite numbers, whatever their place in the block.
    rows = source.integers(0, 48, (32, 256 // block * size), dtype=np.uint8)
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for add in (writer.add_context_length, writer.add_embedding_length):
        add(256)
    for add in (writer.add_block_count, writer.add_head_count, writer.add_feed_forward_length):
        add(1)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([chr(ord("a") + index) for index in range(26)] + ["ab", *"01234"])
    writer.add_token_merges(["a b"])
    writer.add_tensor("token_embd.weight", rows, raw_dtype=kind)
    writer.add_tensor("blk.0.attn_norm.weight", np.ones(256, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    from safetensors.torch import load_file

    found = load_file(converted(path) / "model.safetensors")["model.embed_tokens.weight"]
    expected = torch.from_numpy(quants.dequantize(rows, kind).astype(np.float32)).bfloat16()
    assert torch.equal(found, expected)


def test_a_type_that_gguf_cannot_read_is_refused_by_name(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", random_model("llama"))
    content = path.read_bytes()
    name = b"blk.0.ffn_up.weight"
    at = content.index(name) + len(name) + 4 + 2 * 8  # dimensions, two sizes: then its type
    assert content[at] == gguf.GGMLQuantizationType.F32
    path.write_bytes(content[:at] + bytes([gguf.GGMLQuantizationType.I32]) + content[at + 1 :])
    with pytest.raises(ConversionRefused, match=r"tensor `blk\.0\.ffn_up\.weight` has type I32"):
        converted(path)
