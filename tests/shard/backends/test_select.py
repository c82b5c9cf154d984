"""Which backend serves; what the native one needs is tested beside it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tests.fakes.native import needs_library
from tests.fakes.ranks import run_ranks
from tests.shard.models.test_decoder import CONFIGS

from kagami_shard.backends.native.select import Native
from kagami_shard.backends.select import load_backend
from kagami_shard.machine.distributed import Alone

ARGUMENTS: dict[str, Any] = {
    "dtype": torch.bfloat16,
    "device": torch.device("cpu"),
    "trust_remote_code": False,
    "max_length": 0,
    "parallel": Alone(),
    "quantize": None,
    "memory_fraction": 1.0,
}


def test_without_the_native_backend_torch_serves_for_good(
    save_checkpoint: Callable[..., tuple],
) -> None:
    folder, _ = save_checkpoint(CONFIGS["llama"])
    backend, build = load_backend(folder, native=None, **ARGUMENTS)
    assert (backend.name, build) == ("sdpa", None)
    assert backend.upgrade(None) is backend


def test_several_ranks_are_served_by_torch(
    save_checkpoint: Callable[..., tuple], tmp_path: Path
) -> None:
    needs_library()
    folder, _ = save_checkpoint(CONFIGS["llama"])

    def chosen(group: object) -> object:
        arguments = ARGUMENTS | {"parallel": group}
        backend, build = load_backend(folder, native=Native(tmp_path, 1), **arguments)
        return backend.name, build

    assert run_ranks(2, chosen) == [("sdpa", None)] * 2


def test_a_library_that_is_missing_is_to_be_built(
    save_checkpoint: Callable[..., tuple], tmp_path: Path
) -> None:
    needs_library()
    folder, _ = save_checkpoint(CONFIGS["llama"])
    backend, build = load_backend(folder, native=Native(tmp_path, 1), **ARGUMENTS)
    assert backend.name == "sdpa"
    assert build is not None
