import errno
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from kagami_shard.machine.memory import available_host_bytes, is_out_of_memory, pool_bytes


def test_the_errors_of_real_allocations_are_known() -> None:
    with pytest.raises(RuntimeError) as of_torch:
        torch.empty(2**60, dtype=torch.int8)
    with pytest.raises(MemoryError) as of_python:
        bytearray(2**60)

    assert is_out_of_memory(of_torch.value)
    assert is_out_of_memory(OSError(errno.ENOMEM, "Cannot allocate memory"))
    assert is_out_of_memory(of_python.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_out_of_memory(RuntimeError("the kernel broke"))
    assert not is_out_of_memory(OSError(errno.ENOENT, "No such file or directory"))


@pytest.fixture
def a_tebibyte_at_most() -> Iterator[None]:
    before, most = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (2**40, most))
    yield
    resource.setrlimit(resource.RLIMIT_AS, (before, most))


@pytest.mark.usefixtures("a_tebibyte_at_most")
def test_a_file_that_finds_no_room_to_be_mapped_is_out_of_memory(tmp_path: Path) -> None:
    file = tmp_path / "hole"
    with file.open("wb") as hole:
        hole.truncate(2**40)
    with pytest.raises(RuntimeError) as of_mapping:
        torch.UntypedStorage.from_file(str(file), shared=False, nbytes=2**40)

    assert is_out_of_memory(of_mapping.value)


def test_the_pool_takes_its_share_of_what_is_available() -> None:
    whole = pool_bytes(torch.device("cpu"), 1.0, 1)

    assert 0 < whole < available_host_bytes()
    assert pool_bytes(torch.device("cpu"), 0.5, 1) < 0.75 * whole
    assert pool_bytes(torch.device("cpu"), 1.0, 2) < 0.75 * whole, "ranks share the host"
