"""What every log line about a call says of it, and the line of a call that was answered.

Exactly one line for each generating call: `Success`, the text of its error, or that its client was
gone. Times are in TGI's words and form, in JSON too: log stores read `286.497811ms` as a duration.
"""

import logging
import re
import secrets
import time
from collections.abc import Mapping

from aiohttp import web

from kagami_router.serving.generation_stream import CallStats

logger = logging.getLogger(__name__)

# The id of a request: the client's own, or one of ours; in the answer, the log, and the ids in it.
REQUEST_ID = web.RequestKey("request_id", str)
# What a call has brought until now, whatever becomes of it.
CALL_STATS = web.RequestKey("call_stats", CallStats)
_CLIENTS_ID = re.compile(r"[\x21-\x7e]{1,128}")


def request_id(request: web.Request) -> str:
    """The id of this request: the client's `x-request-id` where it is a sane one."""
    if REQUEST_ID not in request:
        given = request.headers.get("x-request-id", "")
        request[REQUEST_ID] = given if _CLIENTS_ID.fullmatch(given) else secrets.token_hex(12)
    return request[REQUEST_ID]


def origin_of(request: web.Request) -> dict[str, object]:
    """Which call a line is about: at the end of every line, success or not."""
    return {"path": request.path, "request_id": request_id(request)}


def brought_until_now(request: web.Request) -> dict[str, object]:
    """What a call that does not reach its end has brought, behind the error's text."""
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
    """The one line of a call that was answered in full."""
    logger.info("Success", extra={**fields, **origin})


def duration(seconds: float) -> str:
    """`1.234567891s`, `286.497811ms` or `12.5µs`, as Rust prints a duration."""
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if seconds * factor >= 1:
            return f"{seconds * factor:.6f}".rstrip("0").rstrip(".") + unit
    return f"{seconds * 1e9:.0f}ns"
