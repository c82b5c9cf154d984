"""The library under AddressSanitizer and UndefinedBehaviorSanitizer, in a process of its own.

The sanitizer's runtime must be the first library of a process, so the tests of the ops run again in
a child that preloads it. Leaks are not asked for: Python keeps what it likes until the end.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.fakes.native import needs_library

from kagami_shard.backends.native.build import build, find_compiler

pytestmark = pytest.mark.slow
FLAGS = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")


def runtimes(compiler: str) -> str:
    """The sanitizers' libraries; torch needs libstdc++ before them, or their hooks find none."""
    names = ("libasan.so", "libubsan.so", "libstdc++.so")
    found = [
        subprocess.run(
            [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()
        for name in names
    ]
    if not all(Path(path).is_absolute() for path in found):
        pytest.skip("the compiler has no sanitizers")
    return " ".join(found)


def test_the_ops_are_clean(tmp_path: Path) -> None:
    needs_library()
    compiler = find_compiler()
    assert compiler is not None
    library = build(tmp_path, [*FLAGS, "-DKG_EMULATE_TILES"])
    done = subprocess.run(
        [sys.executable, "-m", "tests.shard.backends.native.sanitized", str(library)],
        env={
            **os.environ,
            "LD_PRELOAD": runtimes(compiler),
            "ASAN_OPTIONS": "detect_leaks=0",
            "OMP_NUM_THREADS": "1",
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip() == "ok"
