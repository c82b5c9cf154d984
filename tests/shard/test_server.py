import json
from pathlib import Path

import pytest
import torch

from kagami_proto.errors import InvalidCheckpoint
from kagami_shard.machine import cgroup
from kagami_shard.server import default_threads, eos_token_ids


def write(folder: Path, name: str, content: object) -> None:
    (folder / name).write_text(json.dumps(content), encoding="utf-8")


@pytest.mark.parametrize(
    ("num_cores", "quota", "world_size", "expected"),
    [(8, None, 1, 8), (64, 2, 1, 2), (2, 8, 1, 2), (8, None, 2, 4), (64, 6, 2, 3), (2, 1, 4, 1)],
)
def test_there_are_no_more_threads_than_cores_for_them(
    num_cores: int,
    quota: int | None,
    world_size: int,
    expected: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: num_cores)
    monkeypatch.setattr(cgroup, "num_cores", lambda: quota)
    assert default_threads(world_size) == expected


@pytest.mark.parametrize(("value", "expected"), [(2, [2]), ([2, 5], [2, 5]), (0, [0])])
def test_eos_comes_from_the_generation_config(
    tmp_path: Path, value: object, expected: list[int]
) -> None:
    write(tmp_path, "generation_config.json", {"eos_token_id": value})
    write(tmp_path, "config.json", {"eos_token_id": 9})

    assert eos_token_ids(tmp_path) == expected


def test_eos_falls_back_to_the_config_and_its_text_part(tmp_path: Path) -> None:
    write(tmp_path, "generation_config.json", {"temperature": 1})
    write(tmp_path, "config.json", {"text_config": {"eos_token_id": 4}})

    assert eos_token_ids(tmp_path) == [4]


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
