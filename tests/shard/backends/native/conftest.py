"""The library, built once for all tests; they are left out where it cannot run."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tests.fakes.native import needs_library

from kagami_shard import cli
from kagami_shard.backends.native.build import build
from kagami_shard.backends.native.library import Library
from kagami_shard.backends.native.runtime import Runtime


@pytest.fixture(scope="session")
def native_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where `make install` builds, so that the tests build nothing again."""
    return cli.cache_folder(os.environ)


@pytest.fixture(scope="session")
def library(native_cache: Path) -> Library:
    needs_library()
    return Library(build(native_cache))


@pytest.fixture(scope="session")
def emulated(native_cache: Path) -> Library:
    """The library with AMX's tiles in plain C++."""
    needs_library()
    return Library(build(native_cache, ["-DKG_EMULATE_TILES"]))


@pytest.fixture(params=["avx512, 1 thread", "avx512, 3 threads", "emulated amx"])
def runtime(request: pytest.FixtureRequest) -> Runtime:
    if request.param == "emulated amx":
        return Runtime(request.getfixturevalue("emulated"), 2, use_amx=True)
    threads = 1 if "1 thread" in request.param else 3
    return Runtime(request.getfixturevalue("library"), threads, use_amx=False)


@pytest.fixture(autouse=True)
def _without_gradients() -> Iterator[None]:
    with torch.inference_mode():
        yield
