"""What traces cost: throughput with every request traced against traces off, in the same run.

    python tests/benchmarks/tracing_overhead.py --rounds 8

Two servers of the embedded model stand side by side, one of them exporting to a collector in this
process; rounds of 16 clients (128 tokens in, 128 out) go to them in turn, the first changing places
each time, so that what the machine does besides falls on both.
"""

import argparse
import asyncio
import statistics
import tempfile
from pathlib import Path

from tests.benchmarks.workloads import WORKLOADS, run
from tests.fakes.collector import collecting
from tests.integration.conftest import running


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--rounds", type=int, default=8)
    rounds = parser.parse_args().rounds
    with (
        collecting() as collector,
        tempfile.TemporaryDirectory() as first,
        tempfile.TemporaryDirectory() as second,
        running(Path(first)) as off,
        running(Path(second), "--otlp-endpoint", collector.endpoint) as on,
    ):
        rates: dict[str, list[float]] = {off.url: [], on.url: []}
        for url in rates:
            asyncio.run(run(url, WORKLOADS[1]._replace(output_tokens=8), 10))
        for number in range(rounds):
            for url in (off.url, on.url)[:: 1 if number % 2 else -1]:
                figures = asyncio.run(run(url, WORKLOADS[1], 1000 + 131 * number))
                rates[url].append(figures.output_rate)
        pairs = list(zip(rates[off.url], rates[on.url], strict=True))
        ratio = statistics.median(traced / plain for plain, traced in pairs)
        print("| traces | output tokens/s, median | (min-max) |\n|---|---|---|")
        for name, values in (("off", rates[off.url]), ("every request", rates[on.url])):
            middle = statistics.median(values)
            print(f"| {name} | {middle:.1f} | {min(values):.1f}-{max(values):.1f} |")
        print(
            f"\nmedian of the {rounds} ratios: {ratio:.4f} ({(1 - ratio) * 100:+.2f} % slower);"
            f" {len(collector.spans)} spans arrived, {on.metric(_DROPPED):.0f} were dropped"
        )


_DROPPED = "tgi_trace_spans_dropped_total"

if __name__ == "__main__":
    main()
