"""Starting, stopping, dying: the whole tree."""

import json
import os
import re
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.integration.conftest import BIN, Server, free_port, launch, running, wait_until_healthy

pytestmark = pytest.mark.slow


def descendants(pid: int) -> set[int]:
    """All processes below `pid`."""
    found: set[int] = set()
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            found |= {int(child)} | descendants(int(child))
    return found


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def within(seconds: float, condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.02)
    return condition()


def test_sigterm_ends_every_process_within_five_seconds(tmp_path: Path) -> None:
    with running(tmp_path) as server:
        tree = descendants(server.process.pid)
        server.process.send_signal(signal.SIGTERM)

        assert server.process.wait(timeout=5) == 0
        assert len(tree) == 2
        assert not any(alive(pid) for pid in tree)


def test_killing_the_launcher_leaves_no_orphan(tmp_path: Path) -> None:
    port = free_port()
    process, log = launch(tmp_path, port)
    wait_until_healthy(Server(f"http://127.0.0.1:{port}", process, log))
    tree = descendants(process.pid)

    process.kill()
    process.wait()

    assert len(tree) == 2
    assert within(5, lambda: not any(alive(pid) for pid in tree))


def test_sigterm_to_make_run_ends_every_process(tmp_path: Path) -> None:
    port, log = free_port(), tmp_path / "make.log"
    venv = BIN.parent
    # -o: what the environment holds is not installed again.
    command = ["make", "-o", f"{venv}/.serving", "run", f"VENV={venv}", f"PORT={port}"]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=Path(__file__).parents[2],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "HOSTNAME": "", "SHARD_UDS_PATH": str(tmp_path / "shard")},
        )
    wait_until_healthy(Server(f"http://127.0.0.1:{port}", process, log))
    tree = descendants(process.pid)

    process.send_signal(signal.SIGTERM)
    process.wait(timeout=10)

    assert len(tree) == 3
    assert within(5, lambda: not any(alive(pid) for pid in tree))


def test_sigterm_during_the_load_ends_the_start(tmp_path: Path) -> None:
    process, log = launch(tmp_path, free_port())
    assert within(60, lambda: "Starting shard" in log.read_text())
    tree = descendants(process.pid)

    process.send_signal(signal.SIGTERM)

    assert process.wait(timeout=5) == 0
    assert not any(alive(pid) for pid in tree)


def test_sigterm_lets_a_running_stream_finish(tmp_path: Path) -> None:
    with running(tmp_path) as server:
        body = {
            "inputs": "A long story:",
            "parameters": {"max_new_tokens": 150, "ignore_eos": True},
        }
        request = urllib.request.Request(
            f"{server.url}/generate_stream",
            json.dumps(body).encode(),
            {"content-type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            answer.readline()
            server.process.send_signal(signal.SIGTERM)
            rest = answer.read().decode()

        assert '"index":150' in rest
        assert server.process.wait(timeout=30) == 0


def test_a_dead_shard_is_named_and_ends_the_tree(tmp_path: Path) -> None:
    port = free_port()
    process, log = launch(tmp_path, port)
    wait_until_healthy(Server(f"http://127.0.0.1:{port}", process, log))
    shard = next(
        pid
        for pid in descendants(process.pid)
        if b"text-generation-server" in Path(f"/proc/{pid}/cmdline").read_bytes()
    )

    os.kill(shard, signal.SIGKILL)

    assert process.wait(timeout=30) == 1
    assert "Error: ShardFailed" in log.read_text()


def run_launcher(*flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(BIN / "text-generation-launcher"), *flags],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "HOSTNAME": "", "PORT": ""},
    )


def test_a_missing_model_is_one_clear_line() -> None:
    result = run_launcher("--model-id", "/nowhere/at-all", "--port", str(free_port()))

    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert "/nowhere/at-all" in result.stderr


def test_a_busy_port_is_one_clear_line() -> None:
    with socket.socket() as busy:
        busy.bind(("0.0.0.0", 0))
        busy.listen()
        port = str(busy.getsockname()[1])

        result = run_launcher("--port", port)

    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert port in result.stderr


def test_an_unknown_flag_is_one_clear_line() -> None:
    result = run_launcher("--no-such-flag")

    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert "--no-such-flag" in result.stderr


@pytest.mark.parametrize("command", ["launcher", "router", "server"])
def test_help_and_version_are_instant(command: str) -> None:
    for flag in ("--help", "--version"):
        started = time.monotonic()
        result = subprocess.run(
            [str(BIN / f"text-generation-{command}"), flag], capture_output=True, check=True
        )
        assert result.stdout
        # Torch alone takes 1.5 s to import: that it is not imported is what this shows.
        assert time.monotonic() - started < 1


def test_a_malformed_body_is_a_clear_error(server: Server) -> None:
    request = urllib.request.Request(
        f"{server.url}/generate", b'{"inputs": 5}', {"content-type": "application/json"}
    )

    with pytest.raises(urllib.error.HTTPError) as raised:
        urllib.request.urlopen(request, timeout=10)

    body = json.loads(raised.value.read())
    assert raised.value.code == 422
    assert "inputs" in body["error"]


def test_the_start_up_log_has_the_words_that_scripts_wait_for(server: Server) -> None:
    log = server.log.read_text()

    wanted = (
        r"INFO text_generation_launcher: Args \{",
        "Successfully downloaded weights",
        "Starting shard rank=0",
        r"Shard ready in .*s rank=0",
        "Starting Webserver",
        "Warming up model",
        r"Setting max batch total tokens to \d+",
        "Connected",
    )
    position = 0
    for pattern in wanted:
        match = re.compile(pattern).search(log, position)
        assert match, f"{pattern} is missing, or out of order:\n{log}"
        position = match.end()
