"""A server as processes: started, waited for, ended with all that it started."""

import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.benchmarks.side_by_side.memory import PeakMemory
from tests.benchmarks.side_by_side.processes import send
from tests.integration.conftest import free_port

from kagami_benchmark.facts import gauge

_POLL_S = 0.02
_ANSWER_LIMIT_S = 60
_STOP_LIMIT_S = 20
_LOG_LINES = 15
_FIRST = {"model": "model", "prompt": "The capital of France is", "max_tokens": 1, "temperature": 0}


class NotStarted(Exception):
    """A server ended, or gave no answer in time."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How to start a server."""

    name: str
    command: Sequence[str]
    environment: Mapping[str, str]
    port: int
    limit_s: float


@dataclass(frozen=True, slots=True)
class Running:
    """A server that has answered."""

    name: str
    url: str
    """With the route."""
    start_s: float
    """From its start to its first answer."""
    session: int


@contextlib.contextmanager
def running(plan: Plan, folder: Path, memory: PeakMemory) -> Iterator[Running]:
    """Start a server with its log in `folder`; raises `NotStarted`. Ended in any case."""
    log = folder / f"{plan.name}-{plan.port}.log"
    with log.open("wb") as output:
        started = time.monotonic()
        process = subprocess.Popen(
            plan.command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=plan.environment,
            start_new_session=True,
        )
    memory.add(process.pid)
    url = f"http://127.0.0.1:{plan.port}/v1/completions"
    try:
        if not _answers(url, process, started + plan.limit_s):
            code = process.poll()
            how = f"no answer within {plan.limit_s:g} s" if code is None else f"ended with {code}"
            raise NotStarted(f"{plan.name}: {how}\n{_tail(log)}")
        yield Running(plan.name, url, time.monotonic() - started, process.pid)
    finally:
        memory.drop(process.pid)
        _stop(process)


def _answers(url: str, process: subprocess.Popen[bytes], deadline: float) -> bool:
    """Whether a completion came before the server's end and the deadline."""
    request = urllib.request.Request(
        url, json.dumps(_FIRST).encode(), {"content-type": "application/json"}
    )
    while process.poll() is None and (left := deadline - time.monotonic()) > 0:
        # Connections refused; 503 while it loads; a connection that breaks.
        with contextlib.suppress(OSError, http.client.HTTPException, ValueError):
            with urllib.request.urlopen(request, timeout=min(left, _ANSWER_LIMIT_S)) as answer:
                if json.load(answer).get("choices"):
                    return True
        time.sleep(_POLL_S)
    return False


def told_bandwidth(server: Running) -> float:
    """Bytes a second that our own server found its memory to give at its start; 0: not measured."""
    url = urllib.parse.urljoin(server.url, "/metrics")
    with urllib.request.urlopen(url, timeout=_ANSWER_LIMIT_S) as answer:
        told = gauge(answer.read(), "tgi_memory_bandwidth_bytes_per_second")
    assert told is not None
    return told


def _tail(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines()[-_LOG_LINES:]
    return "\n".join(f"  {line}" for line in lines)


def _stop(process: subprocess.Popen[bytes]) -> None:
    try:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=_STOP_LIMIT_S)
    except subprocess.TimeoutExpired:
        process.kill()
    finally:  # also when it is interrupted once more
        send(signal.SIGKILL, {process.pid})
        process.wait()


def our_plan(weights: str, flags: Sequence[str], model: Path | None, folder: Path) -> Plan:
    """Our launcher; the embedded model where there is no other."""
    port = free_port()
    launcher = Path(sys.executable).parent / "text-generation-launcher"
    where = ["--model-id", str(model)] if model is not None else []
    command = [
        *(str(launcher), *where, "--hostname", "127.0.0.1", "--port", str(port)),
        *("--shard-uds-path", str(folder / f"shard-{port}"), *flags),
    ]
    environment = {**os.environ, "HOSTNAME": "", "PORT": ""}
    return Plan(f"kagami-{weights}", command, environment, port, limit_s=180)
