"""The times of a step. A GPU's events are played: no device is needed."""

import pytest
import torch

from kagami_shard.backends import elapsed
from kagami_shard.backends.elapsed import CudaElapsed, HostElapsed


class Stream:
    """What a GPU does later: events happen in the order in which they were recorded."""

    def __init__(self) -> None:
        self.recorded: list[Event] = []
        self.num_done = 0
        self.fails = False

    def work(self, count: int) -> None:
        self.num_done += count


class Event:
    """`torch.cuda.Event` on the one stream; an event comes 2 ms after the one before it."""

    stream: Stream

    def __init__(self, *, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.stream.recorded.append(self)

    def query(self) -> bool:
        if self.stream.fails:
            raise torch.AcceleratorError(
                "CUDA error: an illegal memory access was encountered", 700
            )
        return self.stream.recorded.index(self) < self.stream.num_done

    def synchronize(self) -> None:
        self.stream.num_done = max(self.stream.num_done, self.stream.recorded.index(self) + 1)

    def elapsed_time(self, end: "Event") -> float:
        order = self.stream.recorded
        assert max(order.index(self), order.index(end)) < self.stream.num_done, "not done yet"
        return 2.0 * (order.index(end) - order.index(self))


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> Stream:
    stream = Stream()
    monkeypatch.setattr(Event, "stream", stream, raising=False)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    return stream


def test_a_gpus_events_stand_around_the_forward_pass_and_the_sampling(stream: Stream) -> None:
    measured = CudaElapsed()
    measured.forward_ends()
    measured.step_ends()

    assert not stream.num_done, "nobody has waited yet"
    assert measured.times() == (4_000_000, 2_000_000)


def test_a_gpu_is_asked_whether_it_is_done_without_waiting(stream: Stream) -> None:
    measured = CudaElapsed()
    measured.forward_ends()
    measured.step_ends()

    stream.work(2)
    assert not measured.is_done
    stream.work(1)
    assert measured.is_done


def test_a_step_that_failed_on_a_gpu_is_done(stream: Stream) -> None:
    measured = CudaElapsed()
    measured.forward_ends()
    measured.step_ends()
    stream.fails = True

    assert measured.is_done, "whoever collects it is told why"


def test_a_cpu_computes_while_it_is_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([150, 180])
    monkeypatch.setattr(elapsed.time, "perf_counter_ns", lambda: next(clock))
    measured = HostElapsed(100)
    measured.forward_ends()
    measured.step_ends()

    assert measured.is_done
    assert measured.times() == (80, 30)
