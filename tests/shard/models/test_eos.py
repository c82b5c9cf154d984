"""Which ids end a text."""

import json
from pathlib import Path

import pytest

from kagami_proto.errors import InvalidCheckpoint
from kagami_shard.models.eos import eos_token_ids


def write(folder: Path, name: str, content: object) -> None:
    (folder / name).write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": 2}, {}, [2]),
        ({"eos_token_id": 0}, {}, [0]),
        ({"eos_token_id": [2, 5]}, {"eos_token_id": 5}, [2, 5]),
        ({"eos_token_id": 2}, {"eos_token_id": [9, 2]}, [2, 9]),
        ({"temperature": 1}, {"text_config": {"eos_token_id": 4}}, [4]),
        ({"eos_token_id": None}, {"eos_token_id": None}, []),
    ],
)
def test_both_configs_count(
    tmp_path: Path, generation: object, config: object, expected: list[int]
) -> None:
    write(tmp_path, "generation_config.json", generation)
    write(tmp_path, "config.json", config)
    assert eos_token_ids(tmp_path) == expected


@pytest.mark.parametrize("eos", ["<|im_end|>", {"content": "<|im_end|>", "special": True}])
def test_the_tokenizers_own_token_counts_beside_them(tmp_path: Path, eos: object) -> None:
    """The generation_config.json of a base model beside the tokenizer of a chat model."""
    write(tmp_path, "generation_config.json", {"eos_token_id": 0})
    added = {"0": {"content": "<|endoftext|>"}, "2": {"content": "<|im_end|>"}, "x": {}, "3": None}
    config = {"eos_token": eos, "added_tokens_decoder": added}
    write(tmp_path, "tokenizer_config.json", config)
    assert eos_token_ids(tmp_path) == [0, 2]


@pytest.mark.parametrize(
    "config", [{}, {"eos_token": 7}, {"eos_token": "</s>", "added_tokens_decoder": []}]
)
def test_a_tokenizer_that_names_none_adds_none(tmp_path: Path, config: object) -> None:
    write(tmp_path, "config.json", {"eos_token_id": 1})
    write(tmp_path, "tokenizer_config.json", config)
    assert eos_token_ids(tmp_path) == [1]


def test_a_model_without_eos_has_none(tmp_path: Path) -> None:
    write(tmp_path, "config.json", {})

    assert eos_token_ids(tmp_path) == []


@pytest.mark.parametrize(
    "value", [-1, 2**32, 2.0, "2", True, {}, [2, None], [[2]], list(range(2000))]
)
def test_an_eos_that_is_no_token_id_is_refused_by_name(tmp_path: Path, value: object) -> None:
    write(tmp_path, "generation_config.json", {"eos_token_id": value})

    with pytest.raises(InvalidCheckpoint, match=r"generation_config\.json: eos_token_id") as raised:
        eos_token_ids(tmp_path)
    assert len(str(raised.value)) < 300


@pytest.mark.parametrize("content", [[], "x", 7, None])
def test_a_generation_config_that_is_no_object_is_refused_by_name(
    tmp_path: Path, content: object
) -> None:
    write(tmp_path, "generation_config.json", content)

    with pytest.raises(InvalidCheckpoint, match=r"generation_config\.json holds no JSON object"):
        eos_token_ids(tmp_path)
