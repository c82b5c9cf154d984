from concurrent import futures
from pathlib import Path
from typing import Any

import grpc

from kagami_proto import generate_pb2, generate_pb2_grpc
from kagami_proto.health import is_healthy


class Service(generate_pb2_grpc.TextGenerationServiceServicer):
    """Answers Health and nothing else."""

    def Health(self, request: Any, context: Any) -> Any:
        return generate_pb2.HealthResponse()


def test_only_an_answer_counts_as_healthy(tmp_path: Path) -> None:
    address = f"unix://{tmp_path}/uds-0"
    assert not is_healthy(address, 1.0)
    server = grpc.server(futures.ThreadPoolExecutor(1))
    generate_pb2_grpc.add_TextGenerationServiceServicer_to_server(Service(), server)
    server.add_insecure_port(address)
    server.start()
    assert is_healthy(address, 5.0)
    server.stop(0).wait()
    assert not is_healthy(address, 1.0)
