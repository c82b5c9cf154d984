"""Ranks that meet, that fail together, and that lose each other."""

import socket
import threading
import time
from pathlib import Path

import pytest
import torch
from tests.fakes.ranks import run_ranks

from kagami_proto.errors import RankLost
from kagami_shard.machine import distributed
from kagami_shard.machine.distributed import Alone, Group, connect

CPU = torch.device("cpu")


def test_one_rank_needs_nobody() -> None:
    alone = connect(0, 1, address="nowhere.invalid", port=1, device=CPU)
    tensor = torch.ones(2, 3)
    assert isinstance(alone, Alone)
    assert alone.all_reduce(tensor) is tensor
    assert alone.all_gather(tensor) is tensor
    assert alone.broadcast(tensor) is tensor


def test_a_sum_is_the_same_everywhere() -> None:
    sums = run_ranks(3, lambda group: group.all_reduce(torch.full((2, 2), 10.0**group.rank)))
    assert all(torch.equal(each, torch.full((2, 2), 111.0)) for each in sums)


def test_parts_are_gathered_beside_one_another() -> None:
    def gather(group: Group) -> list[list[float]]:
        part = torch.tensor([[0.0, 1.0], [4.0, 5.0]]) + 2 * group.rank
        return group.all_gather(part).tolist()

    assert run_ranks(2, gather) == [[[0, 1, 2, 3], [4, 5, 6, 7]]] * 2


def test_no_rows_are_reduced_and_gathered_to_no_rows() -> None:
    def shapes(group: Group) -> list[list[int]]:
        none = torch.empty(0, 3)
        return [list(group.all_reduce(none).shape), list(group.all_gather(none).shape)]

    assert run_ranks(2, shapes) == [[[0, 3], [0, 6]]] * 2


def test_rank_0_is_broadcast() -> None:
    assert run_ranks(2, lambda group: int(group.broadcast(torch.tensor(group.rank)))) == [0, 0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed(dtype: torch.dtype) -> None:
    sums = run_ranks(2, lambda group: group.all_reduce(torch.ones(5, dtype=dtype)))
    assert all(torch.equal(each, torch.full((5,), 2, dtype=dtype)) for each in sums)


def free_port() -> int:
    with socket.create_server(("localhost", 0)) as listener:
        return int(listener.getsockname()[1])


def test_ranks_meet_at_a_port_of_this_host_only() -> None:
    port = free_port()
    groups: dict[int, distributed.TensorParallel] = {}

    def meet(rank: int) -> None:
        groups[rank] = connect(rank, 2, address="localhost", port=port, device=CPU)

    threads = [threading.Thread(target=meet, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [(groups[rank].rank, groups[rank].size) for rank in range(2)] == [(0, 2), (1, 2)]
    lines = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()]
    local = {line[1] for line in lines if line[3] == "0A"}
    assert f"0100007F:{port:04X}" in local
    assert f"00000000:{port:04X}" not in local


def test_a_busy_port_is_one_clear_line() -> None:
    with socket.create_server(("localhost", 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(RankLost) as raised:
            connect(0, 2, address="localhost", port=port, device=CPU)
    assert str(raised.value) == (
        f"port {port} of localhost is already in use: choose another MASTER_PORT"
    )


def test_a_rank_that_never_comes_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "_MEET_S", 0.3)
    with pytest.raises(RankLost, match="rank 0 cannot meet the others at localhost"):
        connect(0, 2, address="localhost", port=free_port(), device=CPU)


def fail(group: Group, *, calls: int) -> type[Exception]:
    """What an exception after some collectives becomes."""
    group._num_calls += calls
    try:
        with group.together():
            raise ValueError("out of luck")
    except (ValueError, RankLost) as error:
        return type(error)


def test_an_error_of_all_ranks_passes() -> None:
    def fail_twice(group: Group) -> list[type[Exception]]:
        return [fail(group, calls=3), fail(group, calls=2)]

    assert run_ranks(2, fail_twice) == [[ValueError, ValueError]] * 2


def test_errors_at_different_places_part_the_ranks() -> None:
    assert run_ranks(2, lambda group: fail(group, calls=group.rank)) == [RankLost, RankLost]


def test_an_error_of_one_rank_ends_both_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "_AGREE_S", 0.2)
    monkeypatch.setattr(distributed, "_COLLECTIVE_S", 1.0)

    def step(group: Group) -> str:
        try:
            with group.together():
                if group.rank == 1:
                    raise MemoryError("no memory left")
                group.all_reduce(torch.ones(1))
        except RankLost as error:
            return str(error)
        return "nothing was raised"

    started = time.monotonic()
    waiting, failing = run_ranks(2, step)
    assert time.monotonic() - started < 5
    assert failing == "rank 1 is out of step with the others: no memory left"
    assert waiting.startswith("rank 0 is out of step with the others: ")
