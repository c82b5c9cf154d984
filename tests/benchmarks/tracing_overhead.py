"""What traces cost: throughput with every request traced against traces off, in the same run.

    python tests/benchmarks/tracing_overhead.py --runs 8

Two servers of the embedded model stand side by side, one of them exporting to a collector in this
process; our own benchmark sends W2 (16 clients, 128 tokens in, 128 out) to them in turn.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

from tests.fakes.collector import collecting
from tests.integration.conftest import embedded_folder, running


def main() -> int:
    with (
        collecting() as collector,
        tempfile.TemporaryDirectory() as first,
        tempfile.TemporaryDirectory() as second,
        running(Path(first)) as off,
        running(Path(second), "--otlp-endpoint", collector.endpoint) as on,
    ):
        code = subprocess.call(
            [
                *(sys.executable, "-m", "kagami_benchmark", "--workload", "W2"),
                *("--url", off.url, "--name", "off", "--tokenizer-name", str(embedded_folder())),
                *("--peer", f"traced={on.url}", *sys.argv[1:]),
            ]
        )
        dropped = on.metric("tgi_trace_spans_dropped_total")
        print(f"{len(collector.spans)} spans arrived, {dropped:.0f} were dropped")
    return code


if __name__ == "__main__":
    sys.exit(main())
