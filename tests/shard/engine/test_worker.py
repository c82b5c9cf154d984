"""The worker's order: what is published when, with and without overlap."""

from concurrent.futures import Future, ThreadPoolExecutor
from threading import Event

import pytest
import torch
from tests.fakes.tiny_model import TinyModel, tiny_backend

from kagami_proto.values import SamplingParams
from kagami_shard.engine.engine import Engine
from kagami_shard.engine.launched import Launched
from kagami_shard.engine.step import NewSequence, Step, StepResult, Work
from kagami_shard.engine.warmup import WarmupLimits
from kagami_shard.engine.worker import Worker

PROMPT = [3, 1, 4, 1, 5]


def new_engine(model: TinyModel) -> Engine:
    engine = Engine(tiny_backend(model), block_size=4)
    engine.warmup(WarmupLimits(16, 4, 40, 100))
    return engine


def steps(sampling: SamplingParams) -> list[Step]:
    new = NewSequence(1, PROMPT, len(PROMPT), sampling)
    first = Step(1, [new], (), [Work(1, 0, 5)], {1: [1, 2, 3]})
    return [first, *(Step(n, work=[Work(1, n + 3, 1)]) for n in range(2, 7))]


def run_all(model: TinyModel, to_run: list[Step], *, overlap: bool) -> list[StepResult]:
    results: list[StepResult] = []
    with ThreadPoolExecutor(1) as thread:
        with Worker(new_engine(model), thread, overlap=overlap) as worker:
            for step in to_run:
                worker.run(step, results.append)
        assert worker.last_step == results[-1].number
    return results


@pytest.mark.parametrize(
    "sampling",
    [SamplingParams(), SamplingParams(do_sample=True, seed=3, repetition_penalty=1.3)],
)
def test_overlap_gives_the_same_results_in_order(sampling: SamplingParams) -> None:
    plain = run_all(TinyModel(), steps(sampling), overlap=False)
    overlapped = run_all(TinyModel(), steps(sampling), overlap=True)

    assert [result.number for result in overlapped] == [1, 2, 3, 4, 5, 6]
    assert [r.token_ids for r in overlapped] == [r.token_ids for r in plain]
    assert not any(result.failures or result.error for result in overlapped)


class FakeElapsed:
    """The times of a device that has, or has not, finished; `error` is raised when waited for."""

    def __init__(self, is_done: bool, error: Exception | None = None) -> None:
        self.is_done = is_done or error is not None
        self._error = error

    def forward_ends(self) -> None: ...

    def step_ends(self) -> None: ...

    def times(self) -> tuple[int, int]:
        if self._error is not None:
            raise self._error
        return 1000, 1000


def on_a_device(launched: Launched | StepResult, elapsed: FakeElapsed) -> Launched:
    """The same step on a device that is as far as `elapsed` says."""
    assert isinstance(launched, Launched)
    return launched._replace(elapsed=elapsed)


@pytest.mark.parametrize(
    ("is_idle", "order"),
    [
        (False, ["launch 1", "launch 2", "result 1", "launch 3", "result 2", "result 3"]),
        (True, ["launch 1", "result 1", "launch 2", "result 2", "launch 3", "result 3"]),
    ],
)
def test_results_of_an_idle_device_do_not_wait_for_the_next_launch(
    is_idle: bool, order: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    all_queued = Event()
    engine = new_engine(TinyModel())
    launch = engine.launch

    def launch_there(step: Step) -> Launched:
        seen.append(f"launch {step.number}")
        return on_a_device(launch(step), FakeElapsed(is_idle))

    monkeypatch.setattr(engine, "launch", launch_there)
    with ThreadPoolExecutor(1) as thread, Worker(engine, thread, overlap=True) as worker:
        worker.call(all_queued.wait)
        for step in steps(SamplingParams())[:3]:
            worker.run(step, lambda result: seen.append(f"result {result.number}"))
        all_queued.set()

    assert seen == order


@pytest.mark.parametrize("overlap", [False, True])
def test_a_failed_step_keeps_its_place(overlap: bool) -> None:
    model = TinyModel()
    model.fail_at = 9
    bad = NewSequence(2, [9, 9], 2, SamplingParams())
    to_run = steps(SamplingParams())[:1]
    to_run += [Step(2, [bad], (), [Work(2, 0, 2)], {2: [5]}), Step(3, work=[Work(1, 5, 1)])]

    results = run_all(model, to_run, overlap=overlap)

    assert [result.number for result in results] == [1, 2, 3]
    assert [result.error for result in results] == ["", "the kernel broke", ""]


def test_calls_run_between_steps_in_their_order() -> None:
    order: list[object] = []
    done: Future[None] = Future()
    first, second, *_ = steps(SamplingParams())

    with (
        ThreadPoolExecutor(1) as thread,
        Worker(new_engine(TinyModel()), thread, overlap=True) as worker,
    ):
        worker.run(first, lambda result: order.append(result.number))
        worker.call(lambda: order.append("call"))
        worker.run(second, lambda result: order.append(result.number))
        worker.call(lambda: done.set_result(None))
        done.result(timeout=10)

    assert order == [1, "call", 2]


def test_memory_is_taken_ahead_only_while_there_is_nothing_to_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    order: list[object] = []
    all_taken = Event()
    engine = new_engine(TinyModel())
    first, *_ = steps(SamplingParams())

    def take() -> bool:
        order.append("take")
        if len(order) == 3:
            worker.run(first, lambda result: order.append(result.number))
        if len(order) > 5:
            all_taken.set()
        return not all_taken.is_set()

    monkeypatch.setattr(engine, "take_memory_ahead", take)
    with ThreadPoolExecutor(1) as thread:
        worker = Worker(engine, thread, overlap=True)
        with worker:
            assert all_taken.wait(10)

    assert order == ["take", "take", "take", 1, "take", "take"]


def test_a_lost_device_ends_the_loop() -> None:
    results: list[StepResult] = []
    engine = new_engine(TinyModel())
    lost = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    def launch(step: Step) -> None:
        raise lost

    engine.launch = launch  # type: ignore[assignment,method-assign]  # a device cannot be broken
    with ThreadPoolExecutor(1) as thread, Worker(engine, thread, overlap=True) as worker:
        worker.run(Step(1), results.append)
        reason = worker.ended.exception(timeout=10)

    assert reason is lost
    assert "illegal memory access" in results[0].error


def test_a_device_that_is_lost_while_it_works_is_told_of_in_the_results() -> None:
    results: list[StepResult] = []
    all_queued = Event()
    engine = new_engine(TinyModel())
    launch = engine.launch
    lost = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
    end = FakeElapsed(False, lost)

    def launch_there(step: Step) -> Launched:
        return on_a_device(launch(step), end)

    engine.launch = launch_there  # type: ignore[method-assign]  # a device cannot be broken
    with ThreadPoolExecutor(1) as thread, Worker(engine, thread, overlap=True) as worker:
        worker.call(all_queued.wait)
        for step in steps(SamplingParams())[:2]:
            worker.run(step, results.append)
        all_queued.set()
        reason = worker.ended.exception(timeout=10)

    assert reason is lost
    assert [(result.number, "illegal memory" in result.error) for result in results] == [(1, True)]
