"""Tests of the CPU's library are skipped where it cannot be built or cannot run."""

import pytest

from kagami_shard.backends.native.build import find_compiler
from kagami_shard.backends.native.cpu import cpu_is_supported


def needs_library() -> None:
    if not cpu_is_supported():
        pytest.skip("the processor has no AVX-512 with bf16 and VNNI")
    if find_compiler() is None:
        pytest.skip("no compiler")
