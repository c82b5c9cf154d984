"""What every generating route adds to an answer: ids, `x-*` headers, the log line.

One HTTP call is one `HttpCall`, however many generations it runs.
"""

import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import truediv
from typing import NamedTuple

from aiohttp import web

from kagami_proto.span_names import OtherServersKey
from kagami_router.api.web.call_log import CALL_STATS, duration, log_answered, origin_of
from kagami_router.request.values import End, ValidRequest
from kagami_router.serving.generation_stream import CallStats
from kagami_router.telemetry.request_trace import describe_answer

TRACES_CONTENT = web.AppKey("traces_content", bool)


@dataclass(frozen=True, slots=True)
class HttpCall:
    """One HTTP call: when it arrived, its counts, and the fields of its log line.

    `id` is ours and becomes part of the ids of answers. The client's own id, if any, is in
    `origin`.
    """

    id: str
    stats: CallStats
    created: int
    """Seconds since the epoch."""
    traces_content: bool
    """Whether the span of the call gets its prompt and its answer."""
    origin: Mapping[str, object]
    """The fields of the log line that identify the call."""

    @property
    def received(self) -> float:
        """When its body was read, in seconds of the monotonic clock."""
        return self.stats.received

    @classmethod
    def of(cls, request: web.Request) -> "HttpCall":
        """The call that starts with `request`, now."""
        return cls(
            secrets.token_hex(12),
            request.setdefault(CALL_STATS, CallStats(time.monotonic())),
            int(time.time()),
            request.app[TRACES_CONTENT],
            origin_of(request),
        )


class Finished(NamedTuple):
    """One finished generation."""

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
    def of(cls, call: HttpCall, finished: Sequence[Finished]) -> "Times":
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
    compute_type: str, call: HttpCall, prompts: Sequence[ValidRequest]
) -> dict[str, str]:
    """The `x-*` headers that are known before the first token; one request for each prompt."""
    return {
        "x-compute-type": compute_type,
        "x-compute-characters": _num_characters(prompts),
        "x-validation-time": _milliseconds(time.monotonic() - call.received),
        "x-prompt-tokens": str(sum(len(one.prompt_ids) for one in prompts)),
    }


def stream_comment(call: HttpCall, finished: Sequence[Finished]) -> bytes:
    """The values that came too late for the headers, as an SSE comment; clients ignore it."""
    phases = {f"{name}-ms": ms for name, ms in _phases(call, finished).items()}
    told = _times_headers(call, finished) | phases
    return f": {' '.join(f'{name}={value}' for name, value in told.items())}\n\n".encode()


def whole_headers(
    compute_type: str,
    prompts: Sequence[ValidRequest],
    call: HttpCall,
    finished: Sequence[Finished],
) -> dict[str, str]:
    """The `x-*` headers of an answer in one piece; `prompts` has one request for each prompt."""
    return {
        "x-compute-type": compute_type,
        "x-compute-characters": _num_characters(prompts),
        "x-prompt-tokens": str(sum(len(one.request.prompt_ids) for one in finished)),
        **_times_headers(call, finished),
        "server-timing": _server_timing(call, finished),
    }


def _num_characters(prompts: Sequence[ValidRequest]) -> str:
    return str(sum(len(one.prompt_text) for one in prompts))


def _phases(call: HttpCall, finished: Sequence[Finished]) -> dict[str, str]:
    """Where the time went, in milliseconds.

    The longest of several generations counts; they run at the same time. `device` is the time of
    the steps that the generation took part in; other requests share these steps.
    """
    timings = [one.end.timings for one in finished]
    seconds = {
        "validate": max(one.submitted - call.received for one in timings),
        "queue": max(one.scheduled - one.submitted for one in timings),
        "prefill": max(one.first_token - one.scheduled for one in timings),
        "decode": max(one.finished - one.first_token for one in timings),
        "device": max(one.device_s for one in timings),
        "total": max(one.finished for one in timings) - call.received,
    }
    return {name: f"{value * 1e3:.3f}" for name, value in seconds.items()}


def _server_timing(call: HttpCall, finished: Sequence[Finished]) -> str:
    """The phases in the format that browsers show: https://www.w3.org/TR/server-timing/."""
    return ", ".join(f"{name};dur={ms}" for name, ms in _phases(call, finished).items())


def _times_headers(call: HttpCall, finished: Sequence[Finished]) -> dict[str, str]:
    """The headers that are known at the end; milliseconds, but x-compute-time in seconds."""
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


def log_success(call: HttpCall, finished: Sequence[Finished]) -> None:
    """Write the log line of a call that was answered in full; times named and printed as in TGI."""
    times = Times.of(call, finished)
    durations = {
        OtherServersKey.TOTAL_TIME: duration(times.total),
        OtherServersKey.VALIDATION_TIME: duration(times.validation),
        OtherServersKey.QUEUE_TIME: duration(times.queue),
        OtherServersKey.INFERENCE_TIME: duration(times.inference),
        OtherServersKey.TIME_PER_TOKEN: duration(times.per_token),
    }
    describe_answer(
        finished,
        answer_id=call.id,
        received=call.received,
        durations=durations,
        with_content=call.traces_content,
    )
    sampling = finished[0].request.sampling
    ends = [one.end for one in finished]
    first_token = min(end.timings.first_token for end in ends)
    log_answered(
        {
            **durations,
            OtherServersKey.SEED: sampling.seed if sampling.do_sample else None,
            "time_to_first_token": duration(first_token - call.received),
            "prompt_tokens": sum(len(one.request.prompt_ids) for one in finished),
            "cached_tokens": sum(end.cached_tokens for end in ends),
            "generated_tokens": sum(end.num_generated for end in ends),
            "finish_reason": ",".join(end.finish_reason.value for end in ends),
        },
        call.origin,
    )


def _milliseconds(seconds: float) -> str:
    return str(int(seconds * 1000))
