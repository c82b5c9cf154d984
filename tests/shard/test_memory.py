import pytest
import torch

from kagami_shard.memory import available_host_bytes, is_out_of_memory, pool_bytes


def test_the_errors_of_real_allocations_are_known() -> None:
    with pytest.raises(RuntimeError) as of_torch:
        torch.empty(2**60, dtype=torch.int8)
    with pytest.raises(MemoryError) as of_python:
        bytearray(2**60)

    assert is_out_of_memory(of_torch.value)
    assert is_out_of_memory(of_python.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert not is_out_of_memory(RuntimeError("the kernel broke"))


def test_the_pool_takes_its_share_of_what_is_available() -> None:
    whole = pool_bytes(torch.device("cpu"), 1.0)

    assert 0 < whole < available_host_bytes()
    assert pool_bytes(torch.device("cpu"), 0.5) < whole
