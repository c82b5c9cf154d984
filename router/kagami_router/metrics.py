"""Every metric by name, and the Prometheus text.

Names, labels and buckets are TGI's where TGI has the metric, and counters keep TGI's names: without
the `_total` that prometheus_client puts behind every counter, which is why the three kinds of
metric and the text are written here. Every series exists from the start with the value 0. One
writer, the event loop's thread, so nothing is locked.
"""

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from kagami_router.scheduler.step import PoolStats

# Seconds, 0.15 ms to 145 s (TGI's: 0.0001 * 1.5^k).
DURATIONS = tuple(0.0001 * 1.5**k for k in range(1, 36))
# TGI has one bucket for each size from 1 to 1024: a thousand lines in every scrape.
BATCH_SIZES = tuple(float(2**k) for k in range(11))
METHODS = ("prefill", "decode")
FAILURES = (
    "overloaded",
    "validation",
    "generation",
    "incomplete",
    "dropped",
    "template",
    "unavailable",
)


@dataclass(frozen=True, slots=True)
class StepStats:
    """What one finished step tells the metrics."""

    num_prefill_tokens: int
    num_decodes: int
    num_new: int
    """Sequences admitted by this step."""
    wall_s: float
    """Sent to result."""
    device_s: float
    failed: bool


@dataclass(frozen=True, slots=True)
class GenerationStats:
    """What one finished generation tells the metrics; seconds and tokens."""

    total_s: float
    validation_s: float
    queue_s: float
    inference_s: float
    time_to_first_token_s: float
    generated_tokens: int


class Series(Protocol):
    """Numbers under one name and one set of labels."""

    def samples(self, name: str, labels: str) -> Iterator[str]:
        """Their lines in the Prometheus text."""
        ...


class Value:
    """One number: a counter or a gauge."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0.0

    def add(self, amount: float = 1.0) -> None:
        self.value += amount

    def set(self, value: float) -> None:
        self.value = float(value)

    def samples(self, name: str, labels: str) -> Iterator[str]:
        """The one line of this series."""
        yield f"{name}{_braces(labels)} {_number(self.value)}\n"


class Histogram:
    """Counts by upper bound; the counts are kept apart and summed up when rendered."""

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Count `value`, `times` over."""
        self._counts[bisect_left(self._bounds, value)] += times
        self._sum += float(value * times)

    def samples(self, name: str, labels: str) -> Iterator[str]:
        """One line a bucket, then sum and count."""
        comma = "," if labels else ""
        total = 0
        for bound, count in zip((*self._bounds, float("inf")), self._counts, strict=True):
            total += count
            yield f'{name}_bucket{{{labels}{comma}le="{_number(bound)}"}} {total}\n'
        yield f"{name}_sum{_braces(labels)} {_number(self._sum)}\n"
        yield f"{name}_count{_braces(labels)} {total}\n"


def _braces(labels: str) -> str:
    return f"{{{labels}}}" if labels else ""


def _number(value: float) -> str:
    if value == float("inf"):
        return "+Inf"
    return str(int(value)) if value.is_integer() and abs(value) < 1e15 else repr(value)


_S = TypeVar("_S", bound=Series)


@dataclass(frozen=True, slots=True)
class _Family:
    name: str
    kind: str
    help: str
    series: tuple[tuple[str, Series], ...]
    """Label text and series."""

    def lines(self) -> Iterator[str]:
        yield f"# HELP {self.name} {self.help}\n# TYPE {self.name} {self.kind}\n"
        for labels, series in self.series:
            yield from series.samples(self.name, labels)


class Metrics:
    """Owns every series; the others tell it what happened.

    The three histograms of lengths have 100 buckets up to `max_input_tokens` and
    `max_total_tokens`, as in TGI; so `Metrics` is made when the model is warm.
    """

    def __init__(self, *, max_input_tokens: int = 4095, max_total_tokens: int = 4096) -> None:
        self._families: list[_Family] = []
        inputs, totals = _hundredths(max_input_tokens), _hundredths(max_total_tokens)
        self._request_count = self._counter("tgi_request_count", "Total number of requests")
        self._request_success = self._counter(
            "tgi_request_success", "Number of successful requests"
        )
        self._request_failure = self._counters(
            "tgi_request_failure", "Number of failed requests by cause", "err", FAILURES
        )
        self._request_duration = self._histogram(
            "tgi_request_duration", "Request duration in seconds", DURATIONS
        )
        self._validation_duration = self._histogram(
            "tgi_request_validation_duration", "Request validation duration in seconds", DURATIONS
        )
        self._queue_duration = self._histogram(
            "tgi_request_queue_duration", "Request queue duration in seconds", DURATIONS
        )
        self._inference_duration = self._histogram(
            "tgi_request_inference_duration", "Request inference duration in seconds", DURATIONS
        )
        self._time_per_token = self._histogram(
            "tgi_request_mean_time_per_token_duration",
            "Mean time per token per request in seconds, prefill included",
            DURATIONS,
        )
        self._generated_tokens = self._histogram(
            "tgi_request_generated_tokens", "Generated tokens per request", totals
        )
        self._input_length = self._histogram(
            "tgi_request_input_length", "Input token length per request", inputs
        )
        self._max_new_tokens = self._histogram(
            "tgi_request_max_new_tokens", "Maximum new tokens per request", totals
        )
        self._first_token = self._histogram(
            "tgi_time_to_first_token",
            "Seconds from the arrival of a request to its first token",
            DURATIONS,
        )
        self._inter_token = self._histogram(
            "tgi_inter_token_latency",
            "Seconds between two tokens of one request, averaged over the tokens of a step",
            DURATIONS,
        )
        self._queue_size = self._gauge("tgi_queue_size", "Current queue size")
        self._batch_next_size = self._histogram(
            "tgi_batch_next_size", "Sequences that joined the batch in one step", BATCH_SIZES
        )
        self._batch_size = self._gauge("tgi_batch_current_size", "Current batch size")
        self._batch_max_tokens = self._gauge(
            "tgi_batch_current_max_tokens", "Tokens that the current batch holds in the KV cache"
        )
        self._inference_count = self._counters(
            "tgi_batch_inference_count",
            "Inference calls per method (prefill or decode)",
            "method",
            METHODS,
        )
        self._inference_success = self._counters(
            "tgi_batch_inference_success",
            "Number of successful inference calls per method (prefill or decode)",
            "method",
            METHODS,
        )
        self._inference_failure = self._counters(
            "tgi_batch_inference_failure",
            "Number of failed inference calls per method (prefill or decode)",
            "method",
            METHODS,
        )
        self._step_duration = self._histograms(
            "tgi_batch_inference_duration",
            "Duration in seconds of one step as the router sees it",
            "method",
            METHODS,
        )
        self._forward_duration = self._histograms(
            "tgi_batch_forward_duration",
            "Duration in seconds of forward pass and sampling on the device",
            "method",
            METHODS,
        )
        self._running = self._gauge("tgi_requests_running", "Sequences in the batch")
        self._waiting = self._gauge("tgi_requests_waiting", "Sequences waiting for the batch")
        self._blocks_total = self._gauge("tgi_kv_blocks_total", "KV blocks in the pool")
        self._blocks_used = self._gauge("tgi_kv_blocks_used", "KV blocks held by sequences")
        self._blocks_cached = self._gauge(
            "tgi_kv_blocks_cached", "KV blocks kept only for the prefix cache"
        )
        self._prefix_hits = self._counter(
            "tgi_prefix_hit_tokens", "Prompt tokens found in the prefix cache"
        )
        self._prefix_prompts = self._counter(
            "tgi_prefix_prompt_tokens", "Prompt tokens looked up in the prefix cache"
        )
        self._preemptions = self._counter(
            "tgi_preemptions", "Sequences that lost their KV blocks and are computed again"
        )

    # What the HTTP side tells.

    def request_started(self) -> None:
        """A generating call came in; one call counts once, whatever number of prompts it has."""
        self._request_count.add()

    def request_succeeded(self) -> None:
        """That call was answered in full."""
        self._request_success.add()

    def request_failed(self, cause: str) -> None:
        """That call failed; `cause` is one of `FAILURES`."""
        self._request_failure[cause].add()

    def request_validated(self, input_tokens: int, max_new_tokens: int) -> None:
        """A prompt passed the door."""
        self._input_length.observe(input_tokens)
        self._max_new_tokens.observe(max_new_tokens)

    def tokens_arrived(self, gap_s: float, count: int) -> None:
        """`count` tokens of one stream came `gap_s` seconds after the ones before them."""
        self._inter_token.observe(gap_s / count, count)

    def generation_finished(self, stats: GenerationStats) -> None:
        """One generation reached its end."""
        self._request_duration.observe(stats.total_s)
        self._validation_duration.observe(stats.validation_s)
        self._queue_duration.observe(stats.queue_s)
        self._inference_duration.observe(stats.inference_s)
        self._time_per_token.observe(stats.inference_s / stats.generated_tokens)
        self._first_token.observe(stats.time_to_first_token_s)
        self._generated_tokens.observe(stats.generated_tokens)

    # What the batching loop tells.

    def step_finished(self, stats: StepStats) -> None:
        """One step came back; a step with any prompt token counts as a prefill."""
        method = "prefill" if stats.num_prefill_tokens else "decode"
        self._inference_count[method].add()
        if stats.num_new:
            self._batch_next_size.observe(stats.num_new)
        if stats.failed:
            self._inference_failure[method].add()
            return
        self._inference_success[method].add()
        self._step_duration[method].observe(stats.wall_s)
        self._forward_duration[method].observe(stats.device_s)

    def pool_changed(self, stats: PoolStats) -> None:
        """The scheduler's queues or the block pool changed."""
        self._queue_size.set(stats.waiting)
        self._waiting.set(stats.waiting)
        self._running.set(stats.running)
        self._batch_size.set(stats.running)
        self._batch_max_tokens.set(stats.running_tokens)
        self._blocks_total.set(stats.blocks_total)
        self._blocks_used.set(stats.blocks_used)
        self._blocks_cached.set(stats.blocks_cached)

    def preempted(self, count: int) -> None:
        """`count` sequences gave their blocks back before their end."""
        self._preemptions.add(count)

    def prefix_looked_up(self, hit_tokens: int, prompt_tokens: int) -> None:
        """A prompt met the prefix cache."""
        self._prefix_hits.add(hit_tokens)
        self._prefix_prompts.add(prompt_tokens)

    def render(self) -> str:
        """Everything in the Prometheus text format 0.0.4."""
        return "".join(line for family in self._families for line in family.lines())

    def _counter(self, name: str, text: str) -> Value:
        return self._add(name, "counter", text, Value())

    def _gauge(self, name: str, text: str) -> Value:
        return self._add(name, "gauge", text, Value())

    def _histogram(self, name: str, text: str, bounds: Sequence[float]) -> Histogram:
        return self._add(name, "histogram", text, Histogram(bounds))

    def _add(self, name: str, kind: str, text: str, series: _S) -> _S:
        self._families.append(_Family(name, kind, text, (("", series),)))
        return series

    def _counters(
        self, name: str, text: str, label: str, values: Iterable[str]
    ) -> dict[str, Value]:
        series = {value: Value() for value in values}
        self._families.append(_Family(name, "counter", text, _labelled(label, series)))
        return series

    def _histograms(
        self, name: str, text: str, label: str, values: Iterable[str]
    ) -> dict[str, Histogram]:
        series = {value: Histogram(DURATIONS) for value in values}
        self._families.append(_Family(name, "histogram", text, _labelled(label, series)))
        return series


def _labelled(label: str, series: Mapping[str, Series]) -> tuple[tuple[str, Series], ...]:
    return tuple((f'{label}="{value}"', one) for value, one in series.items())


def _hundredths(limit: int) -> tuple[float, ...]:
    return tuple(limit / 100 * k for k in range(1, 101))
