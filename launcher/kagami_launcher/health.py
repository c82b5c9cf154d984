"""Whether a served model makes progress; systemd's watchdog is told so.

The router's /health fails once a step is overdue. Without requests there is no step, so every shard
is asked, too. A stopped or hung process does not answer.
"""

import http.client
from collections.abc import Sequence
from typing import NamedTuple

from kagami_proto.health import is_healthy

_TIMEOUT_S = 3.0
_SHOWN = {"tgi_requests_running": "running", "tgi_requests_waiting": "waiting"}


class Health(NamedTuple):
    """Whether the model makes progress, and a line about it for `systemctl status`."""

    is_alive: bool
    status: str


def probe_health(host: str, port: int, sockets: Sequence[str]) -> Health:
    """Ask the shards and the router; one that does not answer takes 3 s."""
    for rank, path in enumerate(sockets):
        if not is_healthy(f"unix://{path}", _TIMEOUT_S):
            return Health(False, f"Shard {rank} does not answer")
    try:
        status, _ = _get(host, port, "/health")
        if status != http.client.OK:
            return Health(False, "Steps make no progress")
        _, text = _get(host, port, "/metrics")
    except (OSError, http.client.HTTPException) as error:
        return Health(False, f"The router does not answer: {error or type(error).__name__}")
    return Health(True, f"Serving: {_counts(text)}")


def _get(host: str, port: int, path: str) -> tuple[int, str]:
    connection = http.client.HTTPConnection(host, port, timeout=_TIMEOUT_S)
    try:
        connection.request("GET", path)
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def _counts(metrics: str) -> str:
    found = dict(line.split(" ", 1) for line in metrics.splitlines() if line.startswith("tgi_requ"))
    return ", ".join(f"{found[name]} {word}" for name, word in _SHOWN.items() if name in found)
