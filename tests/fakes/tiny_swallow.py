"""A checkpoint in the form of tokyotech-llm/Swallow-7b-hf, with two small layers.

Two pickled shards with an index, `tokenizer.model` and no tokenizer.json, the config of 2023. It
was trained on one question and its answer, so a server answers that question in Japanese.
"""

import json
from pathlib import Path

import sentencepiece
import torch
from tests.fakes.pieces import swallow_like
from transformers import LlamaConfig, LlamaForCausalLM

QUESTION = "日本で一番高い山はなんですか？"
# The tokenizer has no pieces for the emoji, the house and the fish: each is several byte tokens.
ANSWER = "\n日本で一番高い山はなんですか?\nベストアンサー\n富士山です。🗻 𠮷野家の𩸽は  500円。"
SPECIALS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
HIDDEN, INNER, HEADS, LAYERS = 64, 176, 4, 2


def write(folder: Path) -> Path:
    """Make the checkpoint in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    model = swallow_like(folder)
    (folder / "corpus.txt").unlink()
    (folder / "tokenizer.model").write_bytes(model)
    settings = {
        **SPECIALS,
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "legacy": True,
        "model_max_length": 1000000000000000019884624838656,
        "sp_model_kwargs": {},
        "tokenizer_class": "LlamaTokenizer",
    }
    _write_json(folder / "tokenizer_config.json", settings)
    _write_json(folder / "special_tokens_map.json", SPECIALS)
    judge = sentencepiece.SentencePieceProcessor(model_proto=model)
    config = _config(judge.vocab_size())
    _write_json(folder / "config.json", config)
    _write_json(folder / "generation_config.json", {"bos_token_id": 1, "eos_token_id": 2})
    ids = [1, *judge.encode(QUESTION + ANSWER), 2]
    _write_shards(folder, _taught(config, ids).state_dict())
    return folder


def _config(vocab_size: int) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "initializer_range": 0.02,
        "intermediate_size": INNER,
        "max_position_embeddings": 4096,
        "model_type": "llama",
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": HEADS,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.31.0",
        "use_cache": True,
        "vocab_size": vocab_size,
    }


def _taught(config: dict[str, object], ids: list[int]) -> LlamaForCausalLM:
    """A model that generates `ids`: seconds of training make each far more likely than others."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**config, "torch_dtype": "float32"}))
    batch = torch.tensor([ids])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    for _ in range(400):
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if loss.item() < 0.01:
            break
    return model.bfloat16()


def _write_shards(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    # Checkpoints of 2023 store a rotary buffer with every layer.
    for layer in range(LAYERS):
        name = f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"
        weights[name] = 10000.0 ** -(torch.arange(0, HIDDEN // HEADS, 2) / (HIDDEN // HEADS))
    in_second = ("model.layers.1.", "model.norm.", "lm_head.")
    weight_map = {
        name: f"pytorch_model-{1 + name.startswith(in_second):05d}-of-00002.bin" for name in weights
    }
    for file in set(weight_map.values()):
        part = {name: weights[name].clone() for name in weights if weight_map[name] == file}
        torch.save(part, folder / file)
    total = sum(tensor.nbytes for tensor in weights.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    _write_json(folder / "pytorch_model.bin.index.json", index)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2), encoding="utf-8")
