"""From the times of tokens to the figures of a table: rates, percentiles, errors. Pure."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, median

from kagami_benchmark.client import Outcome
from kagami_benchmark.load import Run
from kagami_benchmark.workload import Workload


@dataclass(frozen=True, slots=True)
class Spread:
    """Milliseconds: mean and percentiles of `count` values; 0 where there are none."""

    count: int
    mean: float
    p50: float
    p90: float
    p99: float


@dataclass(frozen=True, slots=True)
class ResultRow:
    """One workload on one server: all its measured runs together.

    Rates are the median of the runs, with the lowest and the highest; percentiles are over the
    requests, or the gaps, of all runs.
    """

    target: str
    url: str
    model: str
    workload: Workload
    num_runs: int
    num_requests: int
    """Requests that were sent."""
    num_succeeded: int
    errors: dict[str, int]
    """Error text -> how often it occurred."""
    prompt_tokens: int
    output_tokens: int
    output_rate: float
    """Output tokens a second."""
    output_rate_low: float
    output_rate_high: float
    total_rate: float
    """Prompt and output tokens a second."""
    request_rate: float
    first_token: Spread
    """Time from sending to the first token."""
    inter_token: Spread
    """Time between two tokens of one request that came in separate events."""
    end_to_end: Spread
    """Time from sending to the last byte."""
    client_us_per_token: float
    """CPU time of this client, microseconds; server and client may share the cores."""
    client_cores: float
    """The same as a share of the time: 1.0 is one core that was busy all the time."""
    bandwidth_share: float | None = None
    """Share of the memory's measured bandwidth, as the server said after the last run."""


def percentile(ordered: Sequence[float], percent: float) -> float:
    """A percentile, interpolated between the two nearest values as numpy does by default."""
    place = (len(ordered) - 1) * percent / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def spread(seconds: Iterable[float]) -> Spread:
    """Mean and percentiles of any number of times, which are given in seconds."""
    ordered = sorted(1000 * value for value in seconds)
    if not ordered:
        return Spread(0, 0.0, 0.0, 0.0, 0.0)
    return Spread(
        len(ordered), fmean(ordered), *(percentile(ordered, percent) for percent in (50, 90, 99))
    )


def gaps_of(outcome: Outcome) -> list[float]:
    """Seconds between the tokens of one request."""
    return [after - before for before, after in pairwise(outcome.arrivals)]


def summarize(
    target: str,
    url: str,
    model: str,
    workload: Workload,
    runs: Sequence[Run],
    bandwidth_share: float | None = None,
) -> ResultRow:
    """One row for all runs; `runs` is not empty."""
    every = [outcome for run in runs for outcome in run.outcomes]
    good = [outcome for outcome in every if outcome.succeeded]
    seconds = [max(run.ended - run.started, 1e-9) for run in runs]
    output = [_output_of(run) for run in runs]
    prompt = [_prompt_of(run) for run in runs]
    rates = [count / s for count, s in zip(output, seconds, strict=True)]
    cpu = sum(run.client_cpu_s for run in runs)
    return ResultRow(
        target=target,
        url=url,
        model=model,
        workload=workload,
        num_runs=len(runs),
        num_requests=len(every),
        num_succeeded=len(good),
        errors=dict(Counter(outcome.error for outcome in every if outcome.error)),
        prompt_tokens=sum(prompt),
        output_tokens=sum(output),
        output_rate=median(rates),
        output_rate_low=min(rates),
        output_rate_high=max(rates),
        total_rate=median((a + b) / s for a, b, s in zip(prompt, output, seconds, strict=True)),
        request_rate=median(
            sum(one.succeeded for one in run.outcomes) / s
            for run, s in zip(runs, seconds, strict=True)
        ),
        first_token=spread(one.arrivals[0] - one.started for one in good),
        inter_token=spread(gap for one in good for gap in gaps_of(one)),
        end_to_end=spread(one.ended - one.started for one in good),
        client_us_per_token=1e6 * cpu / max(1, sum(output)),
        client_cores=cpu / sum(seconds),
        bandwidth_share=bandwidth_share,
    )


def _output_of(run: Run) -> int:
    return sum(one.output_tokens for one in run.outcomes if one.succeeded)


def _prompt_of(run: Run) -> int:
    return sum(one.prompt_tokens for one in run.outcomes if one.succeeded)
