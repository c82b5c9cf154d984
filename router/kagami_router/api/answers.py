"""What every generating route does around an answer: ids, `x-*` headers, the line in the log.

One HTTP call is one `Call`, whatever number of generations it runs.
"""

import logging
import re
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from operator import truediv
from typing import NamedTuple

from aiohttp import web

from kagami_router.api.middleware import request_id
from kagami_router.requests import End, ValidRequest
from kagami_router.validation import NO_TRACE, TraceContext

logger = logging.getLogger(__name__)

_TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}.*", re.ASCII)


@dataclass(frozen=True, slots=True)
class Call:
    """One HTTP call: its ids, when it came in (monotonic and wall seconds), its trace.

    `id` is ours and goes into the ids of answers; `request_id` may be the client's own.
    """

    id: str
    request_id: str
    received: float
    created: int
    trace: TraceContext

    @classmethod
    def of(cls, request: web.Request) -> "Call":
        """The call that starts with `request`, now."""
        return cls(
            secrets.token_hex(12),
            request_id(request),
            time.monotonic(),
            int(time.time()),
            _trace_of(request),
        )


def _trace_of(request: web.Request) -> TraceContext:
    traceparent = request.headers.get("traceparent", "")
    tracestate = request.headers.get("tracestate", "")
    if not _TRACEPARENT.fullmatch(traceparent) or not traceparent.isascii():
        return NO_TRACE
    return TraceContext(traceparent, tracestate if tracestate.isascii() else "")


class Finished(NamedTuple):
    """One generation at its end."""

    request: ValidRequest
    end: End


class Times(NamedTuple):
    """Seconds, summed over the generations of a call."""

    total: float
    validation: float
    queue: float
    inference: float
    per_token: float

    @classmethod
    def of(cls, call: Call, finished: Sequence[Finished]) -> "Times":
        """The times of these generations."""
        timings = [one.end.timings for one in finished]
        inference = [one.finished - one.scheduled for one in timings]
        generated = [max(1, one.end.num_generated) for one in finished]
        return cls(
            total=sum(one.finished - call.received for one in timings),
            validation=sum(one.submitted - call.received for one in timings),
            queue=sum(one.scheduled - one.submitted for one in timings),
            inference=sum(inference),
            per_token=sum(map(truediv, inference, generated)),
        )


def stream_headers(
    compute_type: str, call: Call, requests: Sequence[ValidRequest]
) -> dict[str, str]:
    """The `x-*` headers that are known before the first token."""
    return {
        "x-compute-type": compute_type,
        "x-compute-characters": str(sum(len(one.prompt_text) for one in requests)),
        "x-validation-time": _milliseconds(time.monotonic() - call.received),
        "x-prompt-tokens": str(sum(len(one.prompt_ids) for one in requests)),
    }


def stream_comment(call: Call, finished: Sequence[Finished]) -> bytes:
    """What a stream's headers could not tell, as its last line: a comment to every client."""
    told = _times_headers(call, finished).items()
    return f": {' '.join(f'{name}={value}' for name, value in told)}\n\n".encode()


def whole_headers(
    compute_type: str, prompts: Sequence[str], call: Call, finished: Sequence[Finished]
) -> dict[str, str]:
    """The `x-*` headers of an answer in one piece."""
    return {
        "x-compute-type": compute_type,
        "x-compute-characters": str(sum(len(prompt) for prompt in prompts)),
        "x-prompt-tokens": str(sum(len(one.request.prompt_ids) for one in finished)),
        **_times_headers(call, finished),
    }


def _times_headers(call: Call, finished: Sequence[Finished]) -> dict[str, str]:
    """What is known at the end: milliseconds, but x-compute-time in seconds."""
    times = Times.of(call, finished)
    return {
        "x-compute-time": f"{times.total:.9f}",
        "x-total-time": _milliseconds(times.total),
        "x-validation-time": _milliseconds(times.validation),
        "x-queue-time": _milliseconds(times.queue),
        "x-inference-time": _milliseconds(times.inference),
        "x-time-per-token": _milliseconds(times.per_token),
        "x-generated-tokens": str(sum(one.end.num_generated for one in finished)),
    }


def log_success(call: Call, finished: Sequence[Finished]) -> None:
    """The one line of a call that was answered in full; times in TGI's words and form."""
    times = Times.of(call, finished)
    sampling = finished[0].request.sampling
    logger.info(
        "Success",
        extra={
            "total_time": _duration(times.total),
            "validation_time": _duration(times.validation),
            "queue_time": _duration(times.queue),
            "inference_time": _duration(times.inference),
            "time_per_token": _duration(times.per_token),
            "seed": sampling.seed if sampling.do_sample else None,
            "prompt_tokens": sum(len(one.request.prompt_ids) for one in finished),
            "generated_tokens": sum(one.end.num_generated for one in finished),
            "request_id": call.request_id,
        },
    )


def _milliseconds(seconds: float) -> str:
    return str(int(seconds * 1000))


def _duration(seconds: float) -> str:
    """`1.234567891s`, `286.497811ms` or `12.5µs`, as Rust prints a duration."""
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if seconds * factor >= 1:
            return f"{seconds * factor:.6f}".rstrip("0").rstrip(".") + unit
    return f"{seconds * 1e9:.0f}ns"
