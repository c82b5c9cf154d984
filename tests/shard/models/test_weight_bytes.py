"""What a step reads, said by the parts, against the tensors that a model holds."""

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from tests.shard.models.test_decoder import CONFIGS
from transformers import AutoModelForCausalLM, GPTNeoXConfig, PreTrainedConfig

from kagami_shard.backends.torch.load import load_torch
from kagami_shard.models.base import Model

CPU = torch.device("cpu")


def loaded(folder: Path, config: PreTrainedConfig, quantize: str | None = None) -> Model:
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return load_torch(folder, dtype=torch.bfloat16, device=CPU, quantize=quantize).model


def tensors_of(value: object, seen: set[int]) -> list[torch.Tensor]:
    """All that our own objects hold, each once."""
    if id(value) in seen:
        return []
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        return [value]
    parts: list[object] = list(getattr(value, "__dict__", {}).values())
    if isinstance(value, list | tuple):
        parts += value
    if type(value).__module__.startswith("kagami_shard"):
        for kind in type(value).__mro__:
            parts += [getattr(value, name, None) for name in getattr(kind, "__slots__", ())]
    return [tensor for part in parts for tensor in tensors_of(part, seen)]


@pytest.mark.parametrize("quantize", [None, "int8", "int4", "fp8"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_decoder_counts_every_tensor_but_those_of_which_it_reads_rows(
    name: str, quantize: str | None, tmp_path: Path
) -> None:
    decoder = loaded(tmp_path, CONFIGS[name], quantize)
    tables = [decoder._embedding, decoder._ropes]  # type: ignore[attr-defined]  # a Decoder
    by_rows = {id(tensor) for tensor in tensors_of(tables, set())}
    head = {id(tensor) for tensor in tensors_of(decoder._head, set())}  # type: ignore[attr-defined]
    found = [t for t in tensors_of(decoder, set()) if id(t) not in by_rows - head]
    assert decoder.weight_bytes == sum(tensor.nbytes for tensor in found)


def test_a_head_tied_to_the_embedding_is_read_whole(tmp_path: Path) -> None:
    config = deepcopy(CONFIGS["llama"])
    sizes = []
    for is_tied in (False, True):
        config.update({"tie_word_embeddings": is_tied})
        sizes.append(loaded(tmp_path, config).weight_bytes)
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("is_tied", [False, True])
def test_transformers_own_code_counts_all_but_the_embedding(is_tied: bool, tmp_path: Path) -> None:
    config = GPTNeoXConfig(
        vocab_size=99,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        tie_word_embeddings=is_tied,
    )
    model = loaded(tmp_path, config)
    table = 99 * 32 * 2
    assert model.bytes_loaded - table * (not is_tied) <= model.weight_bytes
    assert model.weight_bytes < model.bytes_loaded - table * (not is_tied) + table // 2
