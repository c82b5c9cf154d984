import socket
import sys
from pathlib import Path

import pytest
from tests.fakes.nvidia_smi import fake_nvidia_smi

from kagami_launcher import environment
from kagami_launcher.environment import find_command, port_problem


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


def test_a_busy_port_is_named() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        assert port_problem("127.0.0.1", port) == f"port {port} of 127.0.0.1 is already in use"
    assert port_problem("127.0.0.1", port) == ""


@pytest.mark.parametrize("name", ["a" * 64 + ".example", ".."])
def test_a_name_that_cannot_be_resolved_is_named(name: str) -> None:
    assert port_problem(name, 0).startswith(f"cannot listen on port 0 of {name}: ")


def test_a_name_is_resolved() -> None:
    assert port_problem("localhost", 0) == ""


def test_the_report_has_tgis_lines(tmp_path: Path) -> None:
    text = environment.report({"PATH": fake_nvidia_smi(tmp_path, "Fri May 31", "A10")})
    assert text.startswith("Runtime environment:\nTarget: ")
    assert "\nnvidia-smi:\n   Fri May 31\n   A10\nxpu-smi:\nN/A\n" in text
