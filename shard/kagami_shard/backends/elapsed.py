"""The times of a step, by the host's clock or by a GPU's events."""

import time

import torch


class HostElapsed:
    """For a CPU: launching is computing, so the host's clock measures the device."""

    is_done = True

    def __init__(self, started_ns: int) -> None:
        self._started_ns = self._forward_ns = self._end_ns = started_ns

    def forward_ends(self) -> None:
        self._forward_ns = time.perf_counter_ns()

    def step_ends(self) -> None:
        self._end_ns = time.perf_counter_ns()

    def times(self) -> tuple[int, int]:
        return self._end_ns - self._started_ns, self._end_ns - self._forward_ns


class CudaElapsed:
    """For a GPU: events in the current stream. It begins when it is made."""

    def __init__(self) -> None:
        self._start, self._forward, self._end = (
            torch.cuda.Event(enable_timing=True) for _ in range(3)
        )
        self._start.record()

    def forward_ends(self) -> None:
        self._forward.record()

    def step_ends(self) -> None:
        self._end.record()

    @property
    def is_done(self) -> bool:
        try:
            return bool(self._end.query())
        except torch.AcceleratorError:
            return True  # the step failed; whoever collects it is told

    def times(self) -> tuple[int, int]:
        self._end.synchronize()
        start, forward, end = self._start, self._forward, self._end
        return int(start.elapsed_time(end) * 1e6), int(forward.elapsed_time(end) * 1e6)
