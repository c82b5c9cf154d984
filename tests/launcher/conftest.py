import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.fakes.fake_hub import FakeHub

HERE = Path(__file__).parent


class Launcher:
    """A launcher process with fake children, and all its output until now."""

    def __init__(self, argv: list[str], env: dict[str, str], folder: Path) -> None:
        self.socket = folder / "uds-0"
        self.events = folder / "events"
        self.seen = ""
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "launch_fakes.py"), *argv],
            env=env,
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def wait_for(self, text: str, timeout_s: float = 20.0) -> None:
        """Read stdout until `text` has been seen."""
        assert self.process.stdout is not None
        descriptor = self.process.stdout.fileno()
        deadline = time.monotonic() + timeout_s
        while text not in self.seen:
            ready, _, _ = select.select([descriptor], [], [], max(0, deadline - time.monotonic()))
            chunk = os.read(descriptor, 1 << 20) if ready else b""
            assert chunk, f"{text!r} was not said; said:\n{self.seen}"
            self.seen += chunk.decode()

    def wait_until_serving(self) -> None:
        self.wait_for("Connected\n")

    def finish(self, timeout_s: float = 20.0) -> tuple[int, str, str]:
        """Exit code, everything on stdout, everything on stderr."""
        stdout, stderr = self.process.communicate(timeout=timeout_s)
        return self.process.returncode, self.seen + stdout.decode(), stderr.decode()

    def happened(self) -> list[str]:
        """The children's starts and ends, in order."""
        events = [line.split()[0] for line in self.events.read_text().splitlines()]
        return [event for event in events if event not in ("router-serves", "shard-lost")]

    def child_pids(self) -> list[int]:
        return [int(line.split()[1]) for line in self.events.read_text().splitlines()]


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    """A hub on loopback."""
    fake = FakeHub()
    with fake.serve():
        yield fake


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    """The least that counts as a model folder."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"max_position_embeddings": 256}))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"")
    return folder


@pytest.fixture
def launch(tmp_path: Path, model_folder: Path) -> Iterator[Callable[..., Launcher]]:
    """Start a launcher: flags, and FAKE_* variables by keyword."""
    started: list[Launcher] = []
    commands = {}
    for variable, part in (("FAKE_SERVER", "shard"), ("FAKE_WEB", "router")):
        script = tmp_path / part
        script.write_text(f'#!/bin/sh\nexec {sys.executable} {HERE}/fake_children.py {part} "$@"\n')
        script.chmod(0o755)
        commands[variable] = str(script)

    def start(*flags: str, **fakes: str) -> Launcher:
        env = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
            "HOME": str(tmp_path),
            "FAKE_EVENTS": str(tmp_path / "events"),
            **commands,
            **fakes,
        }
        paths = ["--shard-uds-path", str(tmp_path / "uds"), "--port", "0"]
        argv = [*paths, "--model-id", str(model_folder), *flags]
        started.append(Launcher(argv, env, tmp_path))
        return started[-1]

    yield start
    for launcher in started:
        launcher.process.send_signal(signal.SIGKILL)
        launcher.process.wait()
        for pipe in (launcher.process.stdout, launcher.process.stderr):
            if pipe:
                pipe.close()
