"""What the metrics cost the router's event loop: microseconds by kind of event.

PYTHONPATH=. python tests/benchmarks/metrics_cost.py
"""

import sys
import timeit
from collections.abc import Callable

from tests.router.telemetry.test_metrics import DECODES, MIXED, REPORT, RESULTS, warm

from kagami_router.telemetry.metrics import GenerationStats

ROUNDS, CALLS = 7, 20_000


def microseconds(act: Callable[[], object], calls: int = CALLS) -> float:
    """The median of some rounds."""
    rounds = sorted(timeit.repeat(act, number=calls, repeat=ROUNDS))
    return rounds[ROUNDS // 2] / calls * 1e6


def main() -> None:
    metrics = warm()
    finished = GenerationStats(4.0, 0.5, 0.5, 3.0, 6)
    for name, act in (
        ("a turn of a stream", lambda: metrics.tokens_arrived(0.03, 1)),
        ("a step of decodes, sent", lambda: metrics.step_sent(DECODES)),
        ("a step of decodes, finished", lambda: metrics.step_finished(DECODES, RESULTS, REPORT)),
        ("a step with a newcomer, sent", lambda: metrics.step_sent(MIXED)),
        ("a step with a newcomer, finished", lambda: metrics.step_finished(MIXED, RESULTS, REPORT)),
        ("a generation, finished", lambda: metrics.generation_finished(finished)),
        ("a call", lambda: (metrics.request_started(), metrics.request_succeeded())),
    ):
        sys.stdout.write(f"{name:34} {microseconds(act):8.2f} us\n")
    sys.stdout.write(f"{'a scrape':34} {microseconds(metrics.render, 50):8.2f} us\n")


if __name__ == "__main__":
    main()
