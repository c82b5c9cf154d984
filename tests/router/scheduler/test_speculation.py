"""Drafts: who gets one, and how far it moves a sequence."""

from collections.abc import Sequence as Seq

import pytest
from tests.router.scheduler.test_scheduler import add, answer, new_request, schedule, shape

from kagami_proto.values import Wanted
from kagami_router.scheduler.config import SchedulerConfig
from kagami_router.scheduler.scheduler import Scheduler
from kagami_router.scheduler.sequence import Sequence
from kagami_router.scheduler.step import (
    SequenceFailed,
    Step,
    StepResults,
    TokenSampled,
    VectorComputed,
)


class Guesses:
    """Always guesses the same, as far as it may."""

    def __init__(self, *ids: int) -> None:
        self._ids = ids

    def draft(self, sequence: Sequence, max_tokens: int) -> Seq[int]:
        assert len(sequence.log.ids) == sequence.num_scheduled + 1
        return self._ids[:max_tokens]


def new_scheduler(*guess: int, **changes: int) -> Scheduler:
    limits = {"num_blocks": 65, "block_size": 4, "max_step_tokens": 16, "max_batch_size": 8}
    return Scheduler(SchedulerConfig(**(limits | changes)), Guesses(*guess))


def verifying(max_new_tokens: int = 20, **changes: int) -> tuple[Scheduler, Step]:
    """One sequence whose three guessed tokens are in a step."""
    scheduler = new_scheduler(7, 8, 9, **changes)
    add(scheduler, range(3), max_new_tokens)
    answer(scheduler, schedule(scheduler))
    return scheduler, schedule(scheduler)


def accept(scheduler: Scheduler, step: Step, *ids: int) -> list[TokenSampled]:
    samples = [(1, token_id, -0.5, ()) for token_id in ids]
    events = scheduler.update(StepResults(step.number, samples))
    scheduler.check_integrity()
    return [event for event in events if isinstance(event, TokenSampled)]


def test_a_draft_is_one_item_and_nothing_more_is_scheduled_until_its_result() -> None:
    scheduler, step = verifying()
    assert shape(step) == [(1, 3, 4)]
    assert (step.work[0].wanted, step.drafts) == (Wanted.VERIFY, {1: (7, 8, 9)})
    assert (step.num_decodes, step.num_answers) == (4, 1)
    assert scheduler.schedule(0.0) is None


@pytest.mark.parametrize("ids", [(100,), (7, 100), (7, 8, 100), (7, 8, 9, 100)])
def test_a_sequence_moves_by_what_was_accepted(ids: tuple[int, ...]) -> None:
    scheduler, step = verifying()
    assert [event.token_id for event in accept(scheduler, step, *ids)] == list(ids)
    assert shape(schedule(scheduler)) == [(1, 3 + len(ids), 4)]


def test_accepted_tokens_are_cached() -> None:
    scheduler, step = verifying()
    (last, *_) = accept(scheduler, step, 7, 8, 9, 100)[-1:]
    scheduler.finish(last.sequence)
    add(scheduler, [0, 1, 2, 100, 7, 8, 9, 100, 5])
    new = [new for new in schedule(scheduler).new_sequences if new.id == 2]
    assert [one.num_cached_tokens for one in new] == [4]


def test_a_draft_ends_where_the_sequence_may() -> None:
    scheduler, step = verifying(max_new_tokens=3)
    assert step.drafts == {1: (7,)}
    assert [event.is_last for event in accept(scheduler, step, 7, 100)] == [False, True]
    assert scheduler.schedule(0.0) is not None  # what tells the shards to forget it


def test_a_draft_takes_its_share_of_the_budget() -> None:
    scheduler, _ = verifying(max_step_tokens=3)
    assert scheduler.schedule(0.0) is None
    scheduler, step = verifying(max_step_tokens=3)
    assert step.drafts == {1: (7, 8)}


def test_nobody_is_preempted_for_a_draft() -> None:
    _, step = verifying(max_new_tokens=2, num_blocks=2)
    assert (step.drafts, shape(step)) == ({}, [(1, 3, 1)])


def test_a_shard_that_accepts_nothing_fails_the_sequence() -> None:
    scheduler, step = verifying()
    (event,) = scheduler.update(StepResults(step.number))
    assert isinstance(event, SequenceFailed)
    assert event.message == "the shard returned no token"


def test_after_a_failed_step_a_draft_is_forgotten() -> None:
    scheduler = new_scheduler(7, 8, 9)
    add(scheduler, range(3), 20)
    add(scheduler, range(50, 53), 20)
    answer(scheduler, schedule(scheduler))
    step = schedule(scheduler)
    assert list(step.drafts) == [1, 2]
    assert scheduler.update(StepResults(step.number, error="boom")) == []
    scheduler.check_integrity()
    assert shape(schedule(scheduler)) == [(1, 0, 4)]


def test_what_was_verified_for_a_sequence_that_left_is_discarded() -> None:
    scheduler, step = verifying()
    scheduler.cancel(1)
    assert accept(scheduler, step, 7, 8, 100) == []
    assert not scheduler.stats().blocks_used


def test_a_vector_ends_a_sequence_when_its_prompt_is_computed() -> None:
    scheduler = new_scheduler(7)
    scheduler.add(new_request(range(20), 9, wants_vector=True), 0.0)
    first, second = schedule(scheduler), schedule(scheduler)
    assert [first.work[0].wanted, second.work[0].wanted] == [Wanted.NOTHING, Wanted.VECTOR]
    assert scheduler.schedule(0.0) is None
    scheduler.update(StepResults(first.number))
    scheduler.check_integrity()
    (event,) = scheduler.update(StepResults(second.number, vectors=[(1, (0.5, 1.0))]))
    assert isinstance(event, VectorComputed)
    assert event.vector == (0.5, 1.0)
    assert scheduler.is_idle


def test_a_sequence_without_its_vector_fails_instead_of_hanging() -> None:
    scheduler = new_scheduler()
    scheduler.add(new_request(range(3), wants_vector=True), 0.0)
    (event,) = scheduler.update(StepResults(schedule(scheduler).number))
    assert isinstance(event, SequenceFailed)
    assert event.message == "the shard returned no vector"
