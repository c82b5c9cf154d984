"""Our own server with the embedded model, measured by our own benchmark on the named workloads.

    python tests/benchmarks/embedded.py [FLAGS OF THE BENCHMARK] [-- FLAGS OF THE LAUNCHER]

Other servers in the same run: start them, then `--peer NAME=http://127.0.0.1:PORT/v1/completions`.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.integration.conftest import running

from kagami_launcher import hub, hub_cache


def main() -> int:
    flags, launcher_flags = _split(sys.argv[1:])
    with tempfile.TemporaryDirectory() as folder, running(Path(folder), *launcher_flags) as server:
        cache = hub_cache.cache_folder(None, os.environ)
        model = hub.resolve(hub.EMBEDDED_MODEL_ID, revision=None, cache=cache).folder
        return subprocess.call(
            [
                *(sys.executable, "-m", "kagami_router.benchmark"),
                *("--url", server.url, "--name", "kagami", "--tokenizer-name", str(model)),
                *("--workload", "all", *flags),
            ]
        )


def _split(argv: list[str]) -> tuple[list[str], list[str]]:
    if "--" not in argv:
        return argv, []
    at = argv.index("--")
    return argv[:at], argv[at + 1 :]


if __name__ == "__main__":
    sys.exit(main())
