"""A shard and a router to start instead of the real ones; the environment says how they behave.

FAKE_SHARD: serve (default), die, hang (never ready), deaf (never ready, ignores SIGTERM), crash
(ready; SIGKILLs itself 1.5 s after a router serves), fail (once a router serves it answers no more,
and ends with an error when the router is gone), stuck (ready, ignores SIGTERM); FAKE_SHARD_1 for
rank 1 alone. FAKE_NUM_SHARD: how many the router waits for.
FAKE_ROUTER: serve (default), busy, leave (exit 0 after Connected), lose (ends with an error when a
shard answers no more), deaf, talk.
FAKE_EVENTS: a file that gets a line for each start and end, in order.
"""

import os
import select
import signal
import sys
import threading
from concurrent import futures
from pathlib import Path
from typing import Any

import grpc

from kagami_proto import generate_pb2, generate_pb2_grpc, logs


class Service(generate_pb2_grpc.TextGenerationServiceServicer):
    """Only Health, as a shard answers it."""

    def Health(self, request: Any, context: Any) -> Any:
        return generate_pb2.HealthResponse()


def say(level: str, message: str, target: str = "text_generation_server") -> None:
    sys.stdout.write(logs.LogLine(logs.now(), level, target, message).to_json() + "\n")
    sys.stdout.flush()


def wait_for(event: str, stop: "Stop") -> int:
    """Wait until somebody has noted this event; returns who, by its pid."""
    while True:
        for line in Path(os.environ["FAKE_EVENTS"]).read_text().splitlines():
            if line.startswith(f"{event} "):
                return int(line.split()[1])
        stop.wait(0.02)


def note(event: str) -> None:
    if path := os.environ.get("FAKE_EVENTS"):
        with Path(path).open("a") as file:
            file.write(f"{event} {os.getpid()}\n")


class Stop:
    """Set by SIGTERM, through a pipe as in `Supervisor.signals`: no handler in Python has to run.

    A handler must not set a `threading.Event`: it would wait for a lock that the main thread holds
    while it begins to wait.
    """

    def __init__(self) -> None:
        self._reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer)
        signal.signal(signal.SIGTERM, lambda *_: None)

    def wait(self, timeout_s: float | None = None) -> bool:
        """Whether it is set, at the latest after `timeout_s`."""
        return bool(select.select([self._reader], [], [], timeout_s)[0])


def shard(argv: list[str]) -> int:
    rank = os.environ["RANK"]
    mode = os.environ.get(f"FAKE_SHARD_{rank}") or os.environ.get("FAKE_SHARD", "serve")
    stop = Stop()
    note("shard-start")
    if mode == "die":
        sys.stderr.write("Traceback (most recent call last):\nRuntimeError: no weight for you\n")
        return 1
    if mode == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        say("INFO", "Loading")
        threading.Event().wait()
    if mode == "hang":
        say("INFO", "Loading")
        stop.wait()
        return 0
    address = f"unix://{argv[argv.index('--uds-path') + 1]}-{rank}"
    server = grpc.server(futures.ThreadPoolExecutor(2))
    generate_pb2_grpc.add_TextGenerationServiceServicer_to_server(Service(), server)
    server.add_insecure_port(address)
    server.start()
    say("INFO", f"Server started at {address}")
    if mode == "stuck":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if mode == "crash":
        wait_for("router-serves", stop)
        stop.wait(1.5)  # the launcher has to have seen that all are ready
        os.kill(os.getpid(), signal.SIGKILL)
    if mode == "fail":
        router_pid = wait_for("router-serves", stop)
        server.stop(None).wait()
        note("shard-lost")
        while Path(f"/proc/{router_pid}").exists():
            stop.wait(0.02)
        stop.wait(1.5)  # the launcher knows of the router's end long before this one
        say("ERROR", "the GPU is lost")
        return 1
    stop.wait()
    server.stop(0)
    note("shard-end")
    return 0


def router(argv: list[str]) -> int:
    mode = os.environ.get("FAKE_ROUTER", "serve")
    stop = Stop()
    # Started beside the shards, it waits for them; its warm-up gives the launcher time to see them.
    master = argv[argv.index("--master-shard-uds-path") + 1].removesuffix("-0")
    num_shard = int(os.environ.get("FAKE_NUM_SHARD", "1"))
    while not all(Path(f"{master}-{rank}").exists() for rank in range(num_shard)):
        if stop.wait(0.02):
            return 0
    stop.wait(0.2)
    note("router-start")
    if mode == "busy":
        sys.stderr.write("Error: Axum webserver failed: Address already in use\n")
        return 1
    if mode == "talk":
        say("WARN", "x" * 300_000, "text_generation_router")
        sys.stdout.write("no json on stdout\n")
        sys.stderr.write("no json on stderr")  # and no newline
    if mode == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    say("INFO", "Connected", "text_generation_router")
    note("router-serves")
    if mode == "leave":
        return 0
    if mode == "lose":
        wait_for("shard-lost", stop)
        return 1
    stop.wait()
    note("router-end")
    return 0


if __name__ == "__main__":
    code = {"shard": shard, "router": router}[sys.argv[1]](sys.argv[2:])
    sys.stdout.flush()
    os._exit(code)  # without waiting for gRPC's threads
