from collections.abc import Callable, Iterator
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc
import pytest

from kagami_proto import generate_pb2, generate_pb2_grpc
from kagami_proto.health import is_healthy


class Service(generate_pb2_grpc.TextGenerationServiceServicer):
    """Answers Health and nothing else."""

    def Health(self, request: Any, context: Any) -> Any:
        return generate_pb2.HealthResponse()


@pytest.fixture
def start() -> Iterator[Callable[[str], grpc.Server]]:
    """Starts a server at an address; stops what is left at the end."""
    servers = []

    def at(address: str) -> grpc.Server:
        server = grpc.server(futures.ThreadPoolExecutor(1))
        servers.append(server)
        generate_pb2_grpc.add_TextGenerationServiceServicer_to_server(Service(), server)
        server.add_insecure_port(address)
        server.start()
        return server

    yield at
    for server in servers:
        server.stop(0).wait()


def test_only_an_answer_counts_as_healthy(
    tmp_path: Path, start: Callable[[str], grpc.Server]
) -> None:
    address = f"unix://{tmp_path}/uds-0"
    assert not is_healthy(address, 1.0)
    server = start(address)
    assert is_healthy(address, 5.0)
    server.stop(0).wait()
    assert not is_healthy(address, 1.0)


def test_a_connection_that_failed_before_does_not_answer_for_the_next(
    tmp_path: Path, start: Callable[[str], grpc.Server]
) -> None:
    address = f"unix://{tmp_path}/uds-0"
    with grpc.insecure_channel(address) as early:
        with pytest.raises(grpc.RpcError):
            generate_pb2_grpc.TextGenerationServiceStub(early).Health(
                generate_pb2.HealthRequest(), timeout=1.0
            )
        start(address)
        assert is_healthy(address, 5.0)
