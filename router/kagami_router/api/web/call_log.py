"""The fields of every log line about a call, and the line of a call that was answered.

Each generating call has exactly one line: `Success`, the text of its error, or that its client went
away. Times are named and printed as in TGI, in JSON too: log stores read `286.497811ms` as a
duration.
"""

import logging
import re
import secrets
import time
from collections.abc import Mapping

from aiohttp import web

from kagami_router.serving.generation_stream import CallStats

logger = logging.getLogger(__name__)

# The id of a request: the client's own or one of ours. It is in the answer's headers and the log.
REQUEST_ID = web.RequestKey("request_id", str)
# The counts of a call until now; they are logged even if the call fails.
CALL_STATS = web.RequestKey("call_stats", CallStats)
_CLIENTS_ID = re.compile(r"[\x21-\x7e]{1,128}")


def request_id(request: web.Request) -> str:
    """The id of this request: the client's `x-request-id` if it is well formed, else a new one."""
    if REQUEST_ID not in request:
        given = request.headers.get("x-request-id", "")
        request[REQUEST_ID] = given if _CLIENTS_ID.fullmatch(given) else secrets.token_hex(12)
    return request[REQUEST_ID]


def origin_of(request: web.Request) -> dict[str, object]:
    """The fields that identify a call; they end its log line, success or not."""
    return {"path": request.path, "request_id": request_id(request)}


def brought_until_now(request: web.Request) -> dict[str, object]:
    """The times and counts of a call that did not reach its end, for its log line."""
    stats = request.get(CALL_STATS)
    if stats is None:
        return {}
    fields: dict[str, object] = {"total_time": duration(time.monotonic() - stats.received)}
    if stats.first_token is not None:
        fields["time_to_first_token"] = duration(stats.first_token - stats.received)
    if stats.prompt_tokens:
        fields |= {
            "prompt_tokens": stats.prompt_tokens,
            "generated_tokens": stats.generated_tokens,
        }
    return fields


def log_answered(fields: Mapping[str, object], origin: Mapping[str, object]) -> None:
    """Write the log line of a call that was answered in full."""
    logger.info("Success", extra={**fields, **origin})


def duration(seconds: float) -> str:
    """`1.234567891s`, `286.497811ms` or `12.5µs`, as Rust prints a duration."""
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if seconds * factor >= 1:
            return f"{seconds * factor:.6f}".rstrip("0").rstrip(".") + unit
    return f"{seconds * 1e9:.0f}ns"
