"""CPU time of the router alone: a null shard behind it, a client that only counts in front.

    python tests/benchmarks/router_cost.py --tokenizer FOLDER                        256 streams
    python tests/benchmarks/router_cost.py --tokenizer FOLDER --streams 16 --step-ms 26      as W2

The router has the first core for itself; shard and client share the second. What counts is the
CPU time of the router's process, all of its threads (gRPC has some of its own), for each token and
for each request: the machine's noise is not in it.
"""

import argparse
import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import uvloop

ROUTES = {
    "/generate_stream": lambda prompt, count: {
        "inputs": prompt,
        "parameters": {"max_new_tokens": count, "ignore_eos": True, "details": True},
    },
    "/v1/completions": lambda prompt, count: {
        "model": "m", "prompt": prompt, "max_tokens": count, "temperature": 0,
        "stream": True, "ignore_eos": True,
    },
    "/v1/chat/completions": lambda prompt, count: {
        "model": "m", "messages": [{"role": "user", "content": prompt}], "max_tokens": count,
        "temperature": 0, "stream": True, "ignore_eos": True,
    },
}  # fmt: skip
START_LIMIT_S = 30
TICK_S = 1 / os.sysconf("SC_CLK_TCK")


class Counter(asyncio.Protocol):
    """Sends one request and counts the events of the answer."""

    def __init__(self, message: bytes, done: asyncio.Future[int]) -> None:
        self._message = message
        self._done = done
        self._events = 0

    def connection_made(self, transport: asyncio.Transport) -> None:
        transport.write(self._message)

    def data_received(self, data: bytes) -> None:
        self._events += data.count(b"data:")

    def connection_lost(self, exc: Exception | None) -> None:
        self._done.set_result(self._events)


class Cpu(NamedTuple):
    """Seconds in Python and libraries, and in the kernel for them."""

    user: float
    system: float


class Cost(NamedTuple):
    """What one load took; CPU time by the name of the thread."""

    events: int
    wall_s: float
    threads: dict[str, Cpu]

    @property
    def cpu_s(self) -> float:
        return sum(cpu.user + cpu.system for cpu in self.threads.values())


def message(port: int, path: str, body: object) -> bytes:
    data = json.dumps(body).encode()
    return (
        f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1:{port}\r\ncontent-type: application/json\r\n"
        f"connection: close\r\ncontent-length: {len(data)}\r\n\r\n"
    ).encode() + data


async def load(
    port: int, path: str, *, streams: int, requests: int, count: int, prompt: str
) -> int:
    loop = asyncio.get_running_loop()
    numbers = iter(range(requests))
    events = 0

    async def client() -> None:
        nonlocal events
        for number in numbers:
            done: asyncio.Future[int] = loop.create_future()
            text = message(port, path, ROUTES[path](f"{number} {prompt}", count))
            await loop.create_connection(lambda t=text, d=done: Counter(t, d), "127.0.0.1", port)
            events += await done

    await asyncio.gather(*(client() for _ in range(streams)))
    return events


def cpu_by_thread(pid: int) -> dict[str, Cpu]:
    found: dict[str, Cpu] = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):  # a thread that just ended
            name, _, rest = (task / "stat").read_text().partition("(")[2].rpartition(")")
            user, system = (int(ticks) * TICK_S for ticks in rest.split()[11:13])
            before = found.get(name, Cpu(0, 0))
            found[name] = Cpu(before.user + user, before.system + system)
    return found


def measured(pid: int, work: Callable[[], int]) -> Cost:
    before, start = cpu_by_thread(pid), time.perf_counter()
    events = work()
    wall = time.perf_counter() - start
    spent = {}
    for name, after in cpu_by_thread(pid).items():
        user, system = before.get(name, Cpu(0, 0))
        spent[name] = Cpu(after.user - user, after.system - system)
    return Cost(events, wall, spent)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def pinned(core: int, *command: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen(["taskset", "-c", str(core), *command])


@contextlib.contextmanager
def stopped(process: subprocess.Popen[bytes]) -> Iterator[subprocess.Popen[bytes]]:
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=20)


def wait_until_healthy(port: int) -> None:
    deadline = time.monotonic() + START_LIMIT_S
    while time.monotonic() < deadline:
        with contextlib.suppress(urllib.error.URLError, ConnectionError):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
            return
        time.sleep(0.05)
    raise SystemExit("the router did not start")


def report(title: str, cost: Cost, per: str, number: int) -> None:
    threads = ", ".join(
        f"{name} {1e6 * cpu.user / number:.2f} + {1e6 * cpu.system / number:.2f} kernel"
        for name, cpu in cost.threads.items()
        if sum(cpu) > 0
    )
    print(
        f"{title}: {number} {per}s in {cost.wall_s:.2f} s, {number / cost.wall_s:,.0f} a second;"
        f" CPU {1e6 * cost.cpu_s / number:.2f} µs a {per} ({threads}),"
        f" {number / cost.cpu_s:,.0f} {per}s a CPU second,"
        f" {100 * cost.cpu_s / cost.wall_s:.1f} % of a core",
        flush=True,
    )


def run(args: argparse.Namespace, port: int, pid: int) -> None:
    def work(streams: int, requests: int, count: int) -> Callable[[], int]:
        prompt = "sea " * args.prompt
        going = {"streams": streams, "requests": requests, "count": count, "prompt": prompt}
        return lambda: uvloop.run(load(port, args.route, **going))

    work(args.streams, args.streams, 16)()  # warm
    for _ in range(args.rounds):
        cost = measured(pid, work(args.streams, args.requests or args.streams, args.output))
        number = (args.requests or args.streams) * args.output
        report(f"{args.route}, {args.streams} streams", cost, "token", number)
    if not args.step_ms:
        requests = 16 * args.streams
        cost = measured(pid, work(args.streams, requests, 1))
        report("answers of one token", cost, "request", requests)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--tokenizer", required=True, help="folder of a model")
    parser.add_argument("--route", choices=ROUTES, default="/generate_stream")
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--requests", type=int, help="default: as many as streams")
    parser.add_argument("--prompt", type=int, default=16, help="words")
    parser.add_argument("--output", type=int, default=2000, help="tokens")
    parser.add_argument("--step-ms", type=float, default=0.0, help="of the null shard")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--profile", help="write a cProfile of the router here")
    args = parser.parse_args()
    os.sched_setaffinity(0, {1})
    python, port = sys.executable, free_port()
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/shard-0"
        shard = [python, "tests/fakes/null_shard.py", path, "--step-ms", str(args.step_ms)]
        profile = ["-m", "cProfile", "-o", args.profile] if args.profile else []
        router = [
            *(python, *profile, "-m", "kagami_router", "--port", str(port)),
            *("--hostname", "127.0.0.1", "--master-shard-uds-path", path),
            *("--tokenizer-name", args.tokenizer, "--max-concurrent-requests", "1024"),
            *("--max-batch-size", "1024", "--graceful-termination-timeout", "1"),
        ]
        with stopped(pinned(1, *shard)), stopped(pinned(0, *router)) as process:
            wait_until_healthy(port)
            run(args, port, process.pid)


if __name__ == "__main__":
    main()
