"""A probe: does a shard answer `Health`? For whoever starts shards and waits for them.

Lives here so that gRPC stays out of the launcher. One connection for each question: a channel that
met a missing socket once would wait longer and longer before it tries again.
"""

import grpc

from kagami_proto import generate_pb2, generate_pb2_grpc


def is_healthy(address: str, timeout_s: float) -> bool:
    """Whether the shard at `address` (`unix:///tmp/text-generation-server-0`) answers in time."""
    with grpc.insecure_channel(address) as channel:
        stub = generate_pb2_grpc.TextGenerationServiceStub(channel)
        try:
            stub.Health(generate_pb2.HealthRequest(), timeout=timeout_s)
        except grpc.RpcError:
            return False
    return True
