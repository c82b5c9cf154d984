from pathlib import Path

import pytest
from tests.fakes.native import needs_library

from kagami_shard.backends.native import build as module
from kagami_shard.backends.native.build import (
    BuildFailed,
    build,
    find_compiler,
    find_library,
    library_path,
)
from kagami_shard.backends.native.cpu import cpu_is_supported


def test_what_is_built_is_not_built_again(native_cache: Path, library: object) -> None:
    compiler = find_compiler()
    assert compiler is not None
    path = library_path(native_cache, compiler)
    before = path.stat().st_mtime_ns
    assert build(native_cache) == path
    assert path.stat().st_mtime_ns == before


def test_other_flags_are_another_library(tmp_path: Path) -> None:
    needs_library()
    compiler = find_compiler()
    assert compiler is not None
    assert library_path(tmp_path, compiler, ["-DA"]) != library_path(tmp_path, compiler, ["-DB"])


def test_a_compiler_that_fails_is_told_in_one_line(tmp_path: Path) -> None:
    needs_library()
    with pytest.raises(BuildFailed, match=r"failed with 1: .*error.*") as failed:
        build(tmp_path, ["-include", "is-not-there.h"])
    assert "\n" not in str(failed.value)


def test_no_compiler_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_compiler", lambda: None)
    with pytest.raises(BuildFailed, match="no compiler"):
        build(tmp_path)


def test_what_was_built_is_found_when_the_compiler_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs_library()
    compiler = find_compiler()
    assert compiler is not None
    built = library_path(tmp_path, compiler)
    for path in (built, library_path(tmp_path, compiler, ["-DA"])):
        path.touch()
    monkeypatch.setattr(module, "find_compiler", lambda: None)
    assert find_library(tmp_path) == built
    assert build(tmp_path) == built


def test_a_compiler_that_cannot_run_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_program = tmp_path / "c++"
    no_program.write_text("")
    no_program.chmod(0o755)
    monkeypatch.setattr(module, "find_compiler", lambda: str(no_program))
    with pytest.raises(BuildFailed, match=r"c\+\+ does not say its version: .*Exec format"):
        build(tmp_path)


@pytest.mark.parametrize(
    ("flags", "is_supported"),
    [
        ("avx512f avx512bw avx512vl avx512dq avx512_bf16 avx512_vnni", True),
        ("avx512f avx2", False),
        ("", False),
    ],
)
def test_the_processor_is_asked(tmp_path: Path, flags: str, is_supported: bool) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text(f"processor\t: 0\nflags\t\t: fpu {flags}\n")
    assert cpu_is_supported(cpuinfo) is is_supported
