import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import grpc
import pytest

from kagami_launcher.health import probe_health
from kagami_proto import generate_pb2, generate_pb2_grpc

METRICS = "# TYPE x counter\ntgi_requests_running 3\ntgi_requests_waiting 1\nother 5\n"


class Service(generate_pb2_grpc.TextGenerationServiceServicer):
    def Health(self, request: Any, context: Any) -> Any:
        return generate_pb2.HealthResponse()


@pytest.fixture
def shard(tmp_path: Path) -> Iterator[str]:
    path = str(tmp_path / "shard-0")
    with ThreadPoolExecutor(1) as threads:
        server = grpc.server(threads)
        generate_pb2_grpc.add_TextGenerationServiceServicer_to_server(Service(), server)
        server.add_insecure_port(f"unix://{path}")
        server.start()
        yield path
        server.stop(0).wait()


@pytest.fixture
def health() -> list[int]:
    """The status that the router's /health has next."""
    return [200]


@pytest.fixture
def port(health: list[int]) -> Iterator[int]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(health[0] if self.path == "/health" else 200)
            self.end_headers()
            self.wfile.write(METRICS.encode() if self.path == "/metrics" else b"")

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server.server_address[1]
    server.shutdown()
    thread.join()
    server.server_close()


def test_all_that_answer_are_alive(port: int, shard: str) -> None:
    assert probe_health("127.0.0.1", port, [shard]) == (True, "Serving: 3 running, 1 waiting")


def test_steps_without_progress_are_not(port: int, shard: str, health: list[int]) -> None:
    health[0] = 503
    assert probe_health("127.0.0.1", port, [shard]) == (False, "Steps make no progress")


def test_a_router_that_is_gone_is_not(shard: str) -> None:
    is_alive, status = probe_health("127.0.0.1", 9, [shard])
    assert not is_alive
    assert status.startswith("The router does not answer: ")


def test_one_dead_shard_is_enough(
    port: int, shard: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kagami_launcher.health._TIMEOUT_S", 0.2)
    dead = str(tmp_path / "shard-1")
    assert probe_health("127.0.0.1", port, [shard, dead]) == (False, "Shard 1 does not answer")
