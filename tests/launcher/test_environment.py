import socket
import sys
from pathlib import Path

import pytest

from kagami_launcher import environment
from kagami_launcher.environment import find_command, find_devices, port_problem


def test_a_shard_gets_neither_the_key_nor_the_log_level() -> None:
    base = {"API_KEY": "k", "LOG_LEVEL": "debug", "HOME": "/root"}
    env = environment.for_shard(base, {"RANK": "0"})
    assert env == {
        "HOME": "/root",
        "RANK": "0",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "PYTHONUNBUFFERED": "1",
    }


def test_the_router_inherits_what_is_no_flag_of_the_launcher() -> None:
    base = {"LOG_LEVEL": "debug", "MAX_IMAGE_FETCH_SIZE": "1", "PORT": "80", "API_KEY": "old"}
    env = environment.for_router(base, {"API_KEY": "new"})
    assert env["LOG_LEVEL"] == "debug"
    assert env["MAX_IMAGE_FETCH_SIZE"] == "1"
    assert env["API_KEY"] == "new"
    assert "PORT" not in env


def test_a_conversion_does_not_see_the_key() -> None:
    assert "API_KEY" not in environment.for_conversion({"API_KEY": "k"})


def test_a_command_beside_this_python_comes_first(tmp_path: Path) -> None:
    assert find_command(Path(sys.executable).name, {"PATH": str(tmp_path)}) == sys.executable


def test_a_command_is_found_on_path(tmp_path: Path) -> None:
    script = tmp_path / "some-command"
    script.touch(mode=0o755)
    assert find_command("some-command", {"PATH": str(tmp_path)}) == str(script)
    assert find_command("no-such-command", {"PATH": str(tmp_path)}) is None


def fake_nvidia_smi(folder: Path, *cards: str) -> str:
    script = folder / "nvidia-smi"
    script.write_text("#!/bin/sh\n" + "".join(f"echo '{card}'\n" for card in cards))
    script.chmod(0o755)
    return str(folder)


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


def test_a_busy_port_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        assert port_problem("127.0.0.1", port) == f"port {port} of 127.0.0.1 is already in use"
    assert port_problem("127.0.0.1", port) == ""


def test_the_report_has_tgis_lines(tmp_path: Path) -> None:
    text = environment.report({"PATH": fake_nvidia_smi(tmp_path, "Fri May 31", "A10")})
    assert text.startswith("Runtime environment:\nTarget: ")
    assert "\nnvidia-smi:\n   Fri May 31\n   A10\nxpu-smi:\nN/A\n" in text
