from pathlib import Path

import pytest
from tests.fakes.nvidia_smi import fake_nvidia_smi

from kagami_launcher.devices import find_devices


@pytest.mark.parametrize(
    ("visible", "num_cuda"),
    [(None, 2), ("0", 1), ("0,1,2", 2), ("", 0), ("-1", 0), ("0,-1,1", 1)],
)
def test_devices_are_those_cuda_would_show(
    tmp_path: Path, visible: str | None, num_cuda: int
) -> None:
    base = {"PATH": fake_nvidia_smi(tmp_path, "NVIDIA A10", "NVIDIA A10")}
    if visible is not None:
        base["CUDA_VISIBLE_DEVICES"] = visible
    devices = find_devices(base)
    assert devices.num_cuda == num_cuda
    assert devices.card == ("nvidia-a10" if num_cuda else "")


@pytest.mark.parametrize(
    ("variables", "num_listed"),
    [
        ({}, None),
        ({"CUDA_VISIBLE_DEVICES": "4,5,6"}, 3),
        ({"CUDA_VISIBLE_DEVICES": ""}, 1),
        ({"CUDA_VISIBLE_DEVICES": "0", "NVIDIA_VISIBLE_DEVICES": "0,1"}, 1),
        ({"NVIDIA_VISIBLE_DEVICES": "0,1,2"}, 3),
        ({"NVIDIA_VISIBLE_DEVICES": "all"}, 2),
        ({"NVIDIA_VISIBLE_DEVICES": "void"}, 2),
        ({"ZE_AFFINITY_MASK": "0,1,2,3"}, 4),
    ],
)
def test_devices_are_listed_by_the_first_variable_that_is_set(
    tmp_path: Path, variables: dict[str, str], num_listed: int | None
) -> None:
    base = {"PATH": fake_nvidia_smi(tmp_path, "NVIDIA A10", "NVIDIA A10"), **variables}
    assert find_devices(base).num_listed == num_listed


def test_a_failing_nvidia_smi_is_no_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = fake_nvidia_smi(tmp_path)
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho NVIDIA-SMI has failed; exit 9\n")
    monkeypatch.setattr(Path, "glob", lambda *_: iter(()))
    assert find_devices({"PATH": path}).num_cuda == 0
