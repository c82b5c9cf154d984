import time

import pytest
import torch

from kagami_shard.machine import bandwidth
from kagami_shard.machine.bandwidth import read_bandwidth


def test_without_memory_for_a_buffer_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bandwidth, "_CPU_BYTES", 1 << 60)
    assert read_bandwidth(torch.device("cpu")) == 0


def test_the_bandwidth_is_one_that_a_machine_can_have_and_soon_known() -> None:
    started = time.monotonic()
    assert 1e8 < read_bandwidth(torch.device("cpu")) < 1e13
    assert time.monotonic() - started < 10  # 0.2 s on an idle machine
