"""Builds the library where a compiler is, once for each version of sources, compiler and flags.

At install time `python -m kagami_shard.backends.native` does it; else a shard does in the
background (`select.py`). A build takes about 6 s on one core.
"""

import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

SOURCES = Path(__file__).parent / "src"
COMPILERS = ("c++", "g++", "clang++")
# Those of every processor with AVX-512, bf16 and 8-bit products (VNNI); AMX is asked for function
# by function.
FLAGS = (
    *("-std=c++17", "-O3", "-fPIC", "-shared", "-pthread", "-w"),
    *("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512bf16"),
    *("-mavx512vnni", "-mf16c", "-mfma", "-mbmi2"),
    # Threads share rows whose floats become bf16 in place.
    *("-fno-strict-aliasing", "-fno-math-errno"),
)
_TIMEOUT_S = 300.0


class BuildFailed(Exception):
    """The reason in one line."""


def find_compiler() -> str | None:
    """The first of `COMPILERS` on PATH."""
    return next((found for name in COMPILERS if (found := shutil.which(name))), None)


def library_path(cache: Path, compiler: str, extra: Sequence[str] = ()) -> Path:
    """Where the library of these sources, these flags and this compiler belongs.

    Raises `BuildFailed`.
    """
    version = hashlib.sha256(_version(compiler)).hexdigest()
    return cache / f"{_stem(extra)}-{version[:8]}.so"


def find_library(cache: Path, extra: Sequence[str] = ()) -> Path | None:
    """The library, if it is built; without a compiler any compiler's. Raises `BuildFailed`."""
    if (compiler := find_compiler()) is None:
        return next(cache.glob(f"{_stem(extra)}-*.so"), None)
    path = library_path(cache, compiler, extra)
    return path if path.is_file() else None


def build(cache: Path, extra: Sequence[str] = ()) -> Path:
    """The library's path; built if it is not there. Raises `BuildFailed`."""
    if (built := find_library(cache, extra)) is not None:
        return built
    if (compiler := find_compiler()) is None:
        raise BuildFailed(f"no compiler: none of {', '.join(COMPILERS)} is on PATH")
    path = library_path(cache, compiler, extra)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            output = Path(folder) / path.name
            _compile(compiler, output, extra)
            # On the disk before it has its name: half a library ends the process that loads it.
            with output.open("rb") as written:
                os.fsync(written.fileno())
            os.replace(output, path)  # two shards may build at once
    except OSError as error:
        raise BuildFailed(f"{error}") from error
    return path


def _stem(extra: Sequence[str] = ()) -> str:
    digest = hashlib.sha256()
    for source in sorted(SOURCES.glob("*.cpp")) + sorted(SOURCES.glob("*.h")):
        digest.update(source.name.encode() + source.read_bytes())
    digest.update(repr((*FLAGS, *extra)).encode())
    return f"kagami-native-{digest.hexdigest()[:16]}"


def _compile(compiler: str, output: Path, extra: Sequence[str]) -> None:
    sources = [str(source) for source in sorted(SOURCES.glob("*.cpp"))]
    command = [compiler, *FLAGS, *extra, *sources, "-o", str(output)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        raise BuildFailed(f"{compiler} took more than {_TIMEOUT_S:.0f} s") from error
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "error" in line]
        first = (errors or done.stderr.splitlines() or ["it says nothing"])[0]
        raise BuildFailed(f"{compiler} failed with {done.returncode}: {first.strip()}")


def _version(compiler: str) -> bytes:
    try:
        return subprocess.run([compiler, "--version"], capture_output=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildFailed(f"{compiler} does not say its version: {error}") from error
