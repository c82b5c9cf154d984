"""The library under AddressSanitizer and UndefinedBehaviorSanitizer, in a process of its own.

The sanitizer's runtime must be the first library of a process, so the tests of the ops run again in
a child that preloads it. Leaks are not asked for: Python keeps what it likes until the end.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tests.fakes.native import needs_library

from kagami_shard.backends.native.build import build, find_compiler, library_path

FLAGS = ("-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-DKG_EMULATE_TILES")
KINDS = ("bfloat16", "tied", "int8", "int4", "gptq", "fp8")
MUTANTS = 12


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


@pytest.fixture(scope="module")
def compiler() -> str:
    needs_library()
    found = find_compiler()
    assert found is not None
    runtimes(found)
    return found


@pytest.fixture(scope="module")
def sanitized(compiler: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as fast as can be: 17 s; with -O1 it takes 35."""
    return build(tmp_path_factory.mktemp("sanitized"), [*FLAGS, "-O0"])


def run(compiler: str, *command: str) -> str:
    """What a module says in a process that begins with the sanitizers."""
    done = subprocess.run(
        [sys.executable, "-m", *command],
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
    return done.stdout.strip()


@pytest.mark.slow
def test_the_ops_are_clean(compiler: str, tmp_path: Path) -> None:
    library = build(tmp_path, [*FLAGS, "-O1"])
    assert run(compiler, "tests.shard.backends.native.sanitized", str(library)) == "ok"


def test_sizes_that_lie_are_refused_before_memory_is_touched(
    compiler: str, sanitized: Path
) -> None:
    said = run(compiler, "tests.shard.backends.native.sanitized", str(sanitized), "sizes")
    assert said == "refused"


def test_mutants_of_model_folders_do_not_leave_their_memory(
    compiler: str, sanitized: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    shutil.copyfile(sanitized, library_path(cache, compiler))
    arguments = (str(cache), str(tmp_path / "model"), str(MUTANTS), *KINDS)
    said = run(compiler, "tests.shard.hostile_loads", *arguments).splitlines()
    assert len(said) == len(KINDS) * (1 + MUTANTS)
    assert [line for line in said if not {"served", "refused"} & set(line.split()[3:4])] == []
