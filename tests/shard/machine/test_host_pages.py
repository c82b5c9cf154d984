"""When a CPU's tensors take memory."""

import torch
from tests.fakes.own_memory import resident_bytes
from torch import Tensor

from kagami_shard.machine.host_pages import HostPages

HUGE_PAGE = 2 << 20


def two_tensors(pages: HostPages, num_pages: int) -> list[Tensor]:
    return [pages.zeros((num_pages, HUGE_PAGE // 2), torch.bfloat16) for _ in range(2)]


def test_a_tensor_takes_memory_where_it_is_written() -> None:
    two_tensors(HostPages(0.25), 2)[0].fill_(1)  # what torch itself takes at the first time
    before = resident_bytes()
    first, _ = two_tensors(HostPages(0.25), 32)
    assert resident_bytes() - before < HUGE_PAGE
    first[3] = 1
    assert resident_bytes() - before < 2 * HUGE_PAGE


def test_a_tensor_of_zeros_begins_at_the_border_of_a_huge_page() -> None:
    tensor = HostPages(0.25).zeros((100, 32, 3, 32), torch.float16)
    assert tensor.data_ptr() % HUGE_PAGE == 0
    assert (tensor.shape, tensor.dtype) == ((100, 32, 3, 32), torch.float16)
    assert not tensor.any()


def test_a_share_of_every_tensor_can_be_taken_ahead_page_by_page() -> None:
    pages = HostPages(0.25)
    tensors = two_tensors(pages, 32)
    before = resident_bytes()
    num_taken = 0
    while pages.take_ahead():
        num_taken += 1

    assert num_taken == 2 * 8
    after = resident_bytes()
    assert after - before > (2 * 8 - 1) * HUGE_PAGE
    for tensor in tensors:
        tensor[:8] = 1
    assert resident_bytes() - after < HUGE_PAGE
    assert not any(tensor[8:].any() for tensor in tensors)
