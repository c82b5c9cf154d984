"""What the others tell the metrics, and what that changes.

`Metrics` exists from the first moment of the process; the names stand in `metric_names.py`. What
counts events is told as they happen, what describes a state is asked for when somebody scrapes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from kagami_router.scheduler.step import PoolStats, Step, StepResults
from kagami_router.telemetry.metric_names import BatchSeries, RequestSeries, StateSeries
from kagami_router.telemetry.series import Registry, Value

# Steps and gaps told before they are counted: what counts them touches some hundred objects,
# which a model's step has just driven out of the caches: once for many is a fifth of the cost.
_COUNT_STEPS_AFTER = 32
_COUNT_GAPS_AFTER = 1024
# Of each step in the running mean of the bandwidth's share: some 50 steps count.
_DECAY = 0.98


@dataclass(frozen=True, slots=True)
class Capacity:
    """What the warm-up found: the limits of lengths and steps, and what a step must read."""

    max_input_tokens: int
    max_total_tokens: int
    pool_tokens: int
    max_step_tokens: int
    max_batch_size: int
    weight_bytes: int = 0
    """Read by every step, on one shard"""
    kv_token_bytes: int = 0
    """KV cache of one token, on one shard"""
    bandwidth: float = 0.0
    """Bytes in a second that the memory of the slowest shard can be read with; 0: not measured"""


class StepReport(NamedTuple):
    """What the router saw of one step; seconds, and the tokens that requests got."""

    wall_s: float
    """From the moment the shards could begin with it to its results"""
    update_s: float
    """Moving the scheduler on"""
    text_s: float
    """Making text of the tokens"""
    delivery_s: float
    """Giving them to their requests"""
    num_tokens: int


class _Finished(NamedTuple):
    """What is counted of one step: no sequence is kept alive by it."""

    report: StepReport
    num_prefill_tokens: int
    num_decodes: int
    num_sequences: int
    num_kv_tokens: int
    has_newcomers: bool
    has_failed: bool
    device_ns: int
    sampling_ns: int
    admission_ns: int


@dataclass(frozen=True, slots=True)
class GenerationStats:
    """What one finished generation tells the metrics; seconds and tokens."""

    total_s: float
    validation_s: float
    queue_s: float
    inference_s: float
    generated_tokens: int


class Metrics:
    """Owns every series; the others tell it what happened."""

    def __init__(self) -> None:
        self._registry = Registry()
        self._requests = RequestSeries(self._registry)
        self._batch = BatchSeries(self._registry)
        self._state = StateSeries(self._registry)
        self._capacity: Capacity | None = None
        self._pool: Callable[[], PoolStats] | None = None
        self._shards: Callable[[], Sequence[bool]] = tuple
        self._spans_dropped: Callable[[], int] = int
        self._finished: list[_Finished] = []
        self._gaps: list[tuple[float, int]] = []
        self._recent_bytes = 0.0
        self._recent_device_s = 0.0

    # What the composition root tells.

    def watch_shards(self, are_up: Callable[[], Sequence[bool]]) -> None:
        """Ask this for the state of every rank when somebody scrapes."""
        self._shards = are_up

    def model_ready(self, capacity: Capacity, pool: Callable[[], PoolStats]) -> None:
        """The model is warm; `pool` is asked for the scheduler's state when somebody scrapes.

        Told again whenever shards were opened again. The first time, the three histograms of
        lengths get their bounds: hundredths of the limits, as in TGI.
        """
        if self._capacity is None:
            self._requests.input_length.rebound(_hundredths(capacity.max_input_tokens))
            self._requests.generated_tokens.rebound(_hundredths(capacity.max_total_tokens))
            self._requests.max_new_tokens.rebound(_hundredths(capacity.max_total_tokens))
        self._capacity = capacity
        self._pool = pool
        self._state.max_total_tokens.set(capacity.pool_tokens)
        self._batch.bandwidth.set(capacity.bandwidth)

    def shard_restarted(self, rank: int) -> None:
        """A shard that was lost serves again."""
        _of_rank(self._state.shard_restarts.series, rank).add()

    def watch_spans(self, dropped: Callable[[], int]) -> None:
        """Ask this for the spans lost on the way to the collector when somebody scrapes."""
        self._spans_dropped = dropped

    # What the HTTP side tells.

    def request_started(self) -> None:
        """A generating call came in; one call counts once, whatever number of prompts it has."""
        self._requests.count.add()

    def request_succeeded(self) -> None:
        """That call was answered in full."""
        self._requests.success.add()

    def request_failed(self, cause: str) -> None:
        """That call failed; `cause` is one of `FAILURES`."""
        self._requests.failure[cause].add()

    def request_validated(self, input_tokens: int, max_new_tokens: int) -> None:
        """A prompt is valid."""
        self._requests.input_length.observe(input_tokens)
        self._requests.max_new_tokens.observe(max_new_tokens)

    def first_token_arrived(self, after_s: float) -> None:
        """The first token of a stream came that long after its request."""
        self._requests.first_token.observe(after_s)

    def tokens_arrived(self, gap_s: float, count: int) -> None:
        """`count` tokens of one stream came `gap_s` seconds after the ones before them."""
        gaps = self._gaps
        gaps.append((gap_s, count))
        if len(gaps) >= _COUNT_GAPS_AFTER:
            self._count_gaps()

    def _count_gaps(self) -> None:
        observe = self._requests.inter_token.observe
        for gap_s, count in self._gaps:
            observe(gap_s / count, count)
        self._gaps.clear()

    def generation_finished(self, stats: GenerationStats) -> None:
        """One generation reached its end."""
        requests = self._requests
        requests.duration.observe(stats.total_s)
        requests.validation_duration.observe(stats.validation_s)
        requests.queue_duration.observe(stats.queue_s)
        requests.inference_duration.observe(stats.inference_s)
        requests.time_per_token.observe(stats.inference_s / stats.generated_tokens)
        requests.generated_tokens.observe(stats.generated_tokens)

    # What the batching loop tells.

    def step_sent(self, step: Step) -> None:
        """A step is on its way to the shards; who joined with it, who had to leave."""
        batch = self._batch
        if step.preempted:
            batch.preemptions.add(len(step.preempted))
        if not step.new_sequences:
            return
        batch.next_size.observe(len(step.new_sequences))
        if step.join_reason is not None:
            batch.concat[step.join_reason.value].add()
        for new in step.new_sequences:
            hits, misses = new.num_cached_tokens, len(new.token_ids) - new.num_cached_tokens
            if new.is_replay:
                batch.prompt_tokens["recomputed"].add(misses)
            else:
                batch.prompt_tokens["cached"].add(hits)
                batch.prompt_tokens["computed"].add(misses)
            if new.looked_up:
                batch.prefix_hits.add(hits)
                batch.prefix_lookups.add(hits + misses)

    def step_finished(self, step: Step, results: StepResults, report: StepReport) -> None:
        """One step came back."""
        self._finished.append(
            _Finished(
                report,
                step.num_prefill_tokens,
                step.num_decodes,
                len(step.work),
                step.num_kv_tokens,
                bool(step.new_sequences),
                bool(results.error),
                results.device_ns,
                results.sampling_ns,
                results.admission_ns,
            )
        )
        if len(self._finished) >= _COUNT_STEPS_AFTER:
            self._count_steps()

    def _count_steps(self) -> None:
        for step in self._finished:
            self._count_step(step)
        self._finished.clear()

    def _count_step(self, step: _Finished) -> None:
        """To TGI's `method` a step with any prompt token is a prefill."""
        batch, report = self._batch, step.report
        method = "prefill" if step.num_prefill_tokens else "decode"
        batch.count[method].add()
        if step.has_failed:
            batch.failure[method].add()
            return
        batch.success[method].add()
        batch.duration[method].observe(report.wall_s)
        sampling_s = step.sampling_ns / 1e9
        forward_s = step.device_ns / 1e9 - sampling_s
        batch.forward_duration[method].observe(forward_s)
        batch.decode_duration[method].observe(sampling_s + report.text_s)
        batch.filter_duration[method].observe(report.update_s + report.delivery_s)
        if step.has_newcomers:
            batch.concat_duration[method].observe(step.admission_ns / 1e9)
        if step.num_prefill_tokens and step.num_decodes:
            batch.step_duration["mixed"].observe(report.wall_s)
        else:
            batch.step_duration[method].observe(report.wall_s)
        batch.generated_tokens.add(report.num_tokens)
        self._requests.skipped_tokens.observe(0, report.num_tokens)
        self._see_fill(step)
        if method == "decode":
            self._see_bandwidth(step)

    def _see_fill(self, step: _Finished) -> None:
        if self._capacity is None:
            return
        num_tokens = step.num_prefill_tokens + step.num_decodes
        self._batch.token_fill.observe(num_tokens / self._capacity.max_step_tokens)
        self._batch.sequence_fill.observe(step.num_sequences / self._capacity.max_batch_size)

    def _see_bandwidth(self, step: _Finished) -> None:
        """What a step must read at least: all weights once, and the KV of every sequence."""
        capacity = self._capacity
        if capacity is None or not capacity.weight_bytes:
            return
        num_bytes = capacity.weight_bytes + step.num_kv_tokens * capacity.kv_token_bytes
        self._batch.read_bytes.add(num_bytes)
        self._recent_bytes = self._recent_bytes * _DECAY + num_bytes
        self._recent_device_s = self._recent_device_s * _DECAY + step.device_ns / 1e9

    def render(self) -> str:
        """Everything in the Prometheus text format 0.0.4."""
        self._look()
        return self._registry.render()

    def _look(self) -> None:
        """Bring what describes a state up to now, and count what was only told."""
        self._count_gaps()
        self._count_steps()
        state = self._state
        state.spans_dropped.set(self._spans_dropped())
        for rank, is_up in enumerate(self._shards()):
            _of_rank(state.shard_up.series, rank).set(is_up)
            _of_rank(state.shard_restarts.series, rank)
        if self._capacity is not None and self._capacity.bandwidth and self._recent_device_s:
            rate = self._recent_bytes / self._recent_device_s
            self._batch.bandwidth_share.set(rate / self._capacity.bandwidth)
        if self._pool is None:
            return
        pool = self._pool()
        state.queue_size.set(pool.waiting)
        state.waiting.set(pool.waiting)
        state.running.set(pool.running)
        state.batch_size.set(pool.running)
        state.batch_tokens.set(pool.running_tokens)
        state.blocks.set(pool.blocks_total)
        state.blocks_used.set(pool.blocks_used)
        state.blocks_cached.set(pool.blocks_cached)


def _of_rank(series: dict[str, Value], rank: int) -> Value:
    return series.setdefault(str(rank), Value())


def _hundredths(limit: int) -> tuple[float, ...]:
    return tuple(limit / 100 * k for k in range(1, 101))
