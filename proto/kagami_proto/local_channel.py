"""gRPC's options between the processes of one server: any size, and no clock on a silent peer.

A peer that was stopped for a while (SIGSTOP, a debugger, a frozen container) goes on where it was.
A peer that has died closes its socket, and its kernel says so.
"""

from collections.abc import Sequence

_NEVER_MS = (1 << 31) - 1

OPTIONS: Sequence[tuple[str, int]] = (
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    # gRPC sends pings to measure the network, and ends a connection when none of its pings has been
    # answered for a minute.
    ("grpc.http2.ping_timeout_ms", _NEVER_MS),
)
