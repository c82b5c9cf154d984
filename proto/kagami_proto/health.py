"""A probe: does a shard answer `Health`? For those who start shards and wait for them.

It lives here so that the launcher does not import gRPC. Every question has a new connection. A
connection that found no socket waits longer and longer before it tries again, and gRPC shares it
among all channels of the process with the same address, unless told not to.
"""

import grpc

from kagami_proto import generate_pb2, generate_pb2_grpc


def is_healthy(address: str, timeout_s: float) -> bool:
    """Whether the shard at `address` (`unix:///tmp/text-generation-server-0`) answers in time."""
    own = [("grpc.use_local_subchannel_pool", 1)]
    with grpc.insecure_channel(address, own) as channel:
        stub = generate_pb2_grpc.TextGenerationServiceStub(channel)
        try:
            stub.Health(generate_pb2.HealthRequest(), timeout=timeout_s)
        except grpc.RpcError:
            return False
    return True
