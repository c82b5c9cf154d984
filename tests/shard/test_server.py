import json
from pathlib import Path

import pytest
import torch

from kagami_shard.machine import cgroup
from kagami_shard.server import default_threads


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
