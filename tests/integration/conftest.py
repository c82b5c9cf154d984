"""Real servers with the embedded model: launcher, shard and router as processes."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

BIN = Path(sys.executable).parent
START_LIMIT_S = 180  # the very first start converts the model


@dataclass(frozen=True)
class Server:
    """A running tree."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def metric(self, name: str) -> float:
        """The value of a metric without labels."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=10) as answer:
            for line in answer.read().decode().splitlines():
                if line.startswith(f"{name} "):
                    return float(line.split()[1])
        raise KeyError(name)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def launch(
    folder: Path, port: int, *flags: str, environ: dict[str, str] | None = None
) -> tuple[subprocess.Popen[bytes], Path]:
    """Start a launcher whose sockets and log lie in `folder`."""
    log = folder / f"launcher-{port}.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [
                str(BIN / "text-generation-launcher"),
                *("--port", str(port), "--hostname", "127.0.0.1"),
                *("--shard-uds-path", str(folder / f"shard-{port}")),
                *flags,
            ],
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "HOSTNAME": "", "PORT": "", **(environ or {})},
        )
    return process, log


def wait_until_healthy(server: Server) -> None:
    deadline = time.monotonic() + START_LIMIT_S
    while time.monotonic() < deadline:
        if server.process.poll() is not None:
            break
        with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
            urllib.request.urlopen(f"{server.url}/health", timeout=5).close()
            return
        time.sleep(0.05)
    raise AssertionError(f"the server did not start:\n{server.log.read_text()}")


@contextlib.contextmanager
def running(folder: Path, *flags: str, environ: dict[str, str] | None = None) -> Iterator[Server]:
    """A server that answers; stopped by SIGTERM at the end."""
    port = free_port()
    process, log = launch(folder, port, *flags, environ=environ)
    server = Server(f"http://127.0.0.1:{port}", process, log)
    try:
        wait_until_healthy(server)
        yield server
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            raise


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The embedded model in float32, where results can be compared exactly."""
    with running(tmp_path_factory.mktemp("float32"), "--dtype", "float32") as started:
        yield started


@pytest.fixture(scope="session")
def bf16_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The embedded model as it is served by default."""
    with running(tmp_path_factory.mktemp("bfloat16")) as started:
        yield started


@pytest.fixture(scope="session")
def model_folder(server: Server) -> Path:
    return embedded_folder()


def embedded_folder() -> Path:
    """Where the launcher has put the embedded model, once it was served."""
    from kagami_launcher.model import hub_cache
    from kagami_launcher.model import source as hub

    cache = hub_cache.cache_folder(None, os.environ)
    return hub.resolve(hub.EMBEDDED_MODEL_ID, revision=None, cache=cache).folder


PROMPTS: Sequence[str] = (
    "The capital of France is",
    "Once upon a time, in a village by the sea,",
    "The three laws of thermodynamics are",
    "Q: What is 17 plus 25?\nA:",
    "Dear Sir or Madam,\n\nI am writing to",
    "The quick brown fox",
    "In 1969, Neil Armstrong",
    "日本で一番高い山はなんですか？",
    "東京の天気は",
    "こんにちは、私の名前は",
    "吾輩は猫である。名前は",
    "def fibonacci(n):\n    ",
    "import numpy as np\n\ndef softmax(x):\n",
    "SELECT name, age FROM users WHERE",
    '{"name": "Ada", "born":',
    "I love pizza 🍕 and sushi 🍣 because",
    "🎉🎂 Happy birthday",
    "<|im_start|>user\nWhat is gravity?<|im_end|>\n<|im_start|>assistant\n",
    "Vive la République ! Les Français sont",
    # About 1,500 tokens.
    " ".join(f"Chapter {n}: the {n}th day was longer than the one before it." for n in range(90))
    + " In the end",
)
