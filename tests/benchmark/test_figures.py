from array import array

import pytest

from kagami_benchmark.client import Outcome
from kagami_benchmark.figures import percentile, spread, summarize
from kagami_benchmark.load import Run
from kagami_benchmark.workload import NAMED


def outcome(started: float, *arrivals: float, error: str = "") -> Outcome:
    return Outcome(
        started=started,
        arrivals=array("d", arrivals),
        ended=arrivals[-1] if arrivals else started + 1,
        prompt_tokens=10,
        output_tokens=len(arrivals),
        error=error,
    )


def run(*outcomes: Outcome, seconds: float = 10.0) -> Run:
    return Run(len(outcomes), list(outcomes), started=100.0, ended=100.0 + seconds)


def test_percentiles_lie_between_the_nearest_values() -> None:
    assert [percentile([0, 10, 20, 30, 40], each) for each in (0, 50, 90, 100)] == [0, 20, 36, 40]


def test_one_value_is_every_percentile() -> None:
    assert [percentile([7], each) for each in (0, 50, 99)] == [7, 7, 7]


def test_a_spread_of_nothing_is_zeros() -> None:
    assert spread([]).count == 0


def test_latencies_are_milliseconds_of_requests_that_succeeded() -> None:
    row = summarize(
        "s",
        "u",
        "m",
        NAMED["W1"],
        [run(outcome(100, 101, 101.1, 101.3), outcome(100, 109, error="cut"))],
    )

    assert row.first_token.p50 == pytest.approx(1000)
    assert row.inter_token.p50 == pytest.approx(150)
    assert row.end_to_end.p99 == pytest.approx(1300)


def test_rates_are_the_median_of_the_runs() -> None:
    three = [run(outcome(100, 101, 102), seconds=seconds) for seconds in (1, 2, 4)]

    row = summarize("s", "u", "m", NAMED["W1"], three)

    assert (row.output_rate_low, row.output_rate, row.output_rate_high) == (0.5, 1.0, 2.0)
    assert row.total_rate == 6.0
    assert row.request_rate == 0.5


def test_errors_are_counted_by_their_text() -> None:
    failed = [outcome(100, error="429 no room"), outcome(100, error="429 no room")]

    row = summarize("s", "u", "m", NAMED["W1"], [run(*failed, outcome(100, 101))])

    assert row.errors == {"429 no room": 2}
    assert (row.num_succeeded, row.num_requests) == (1, 3)


def test_the_clients_own_cost_is_told_for_each_token() -> None:
    one = run(outcome(100, 101, 102))
    one.client_cpu_s = 0.5

    row = summarize("s", "u", "m", NAMED["W1"], [one])

    assert (row.client_us_per_token, row.client_cores) == (250_000, 0.05)
