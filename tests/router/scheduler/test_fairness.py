"""Callers share steps, blocks and places; nobody waits for somebody else's queue."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.fakes.callers import ALICE, BLOCK, BOB, CAROL, Load, has_ended, has_token

from kagami_router.scheduler.fairness import LEAST_PROGRESS
from kagami_router.scheduler.sequence import Sequence, Status
from kagami_router.scheduler.step import StepResults


@pytest.mark.parametrize("num_before", [0, 1, 5])
@pytest.mark.parametrize("num_long", [1, 2, 127])
def test_a_short_request_does_not_wait_for_the_long_ones_of_another(
    num_long: int, num_before: int
) -> None:
    load = Load(num_blocks=100_001)
    for _ in range(num_long):
        load.ask(ALICE, 900, 50)
    load.run(num_before)
    short = load.ask(BOB, 20)
    assert load.steps_until(has_token(short)) == 1


@pytest.mark.parametrize("num_others", [2, 3, 40, 100])
def test_nor_for_those_of_many_others(num_others: int) -> None:
    load = Load(num_blocks=100_001, max_batch_size=128)
    for number in range(num_others):
        load.ask(str(number), 900, 5)
        load.ask(str(number), 900, 5)
    load.run(3)
    short = load.ask(BOB, 20)
    assert load.steps_until(has_token(short)) <= 1 + num_others * 32 // 128


def test_decodes_go_before_all_prompts() -> None:
    load = Load()
    stream = load.ask(BOB, 4, 100)
    load.run()
    for _ in range(20):
        load.ask(ALICE, 900)
        load.ask(CAROL, 900)
    before = len(stream.log.generated_ids)
    load.run(10)
    assert len(stream.log.generated_ids) == before + 10


def test_choices_of_one_request_are_one_caller() -> None:
    load = Load()
    for _ in range(30):
        load.ask(ALICE, 300)
    load.run()
    choices = [load.ask(BOB, 20, prompt=77) for _ in range(4)]
    assert load.steps_until(lambda: all(has_token(each)() for each in choices)) <= 4


def fill_pool(load: Load, size: int, max_new: int = 2000) -> list[Sequence]:
    """Alice takes as many blocks as she can get."""
    mine = [load.ask(ALICE, size, max_new) for _ in range(30)]
    load.run(100)
    assert sum(each.status is Status.RUNNING for each in mine) < 30
    return mine


@pytest.mark.parametrize("size", [100, 400, 900])
def test_a_pool_full_of_one_callers_prompts_makes_room_for_a_newcomer(size: int) -> None:
    load = Load()
    mine = fill_pool(load, size)
    running = [each for each in mine if each.status is Status.RUNNING]
    before = load.num_preempted
    short = load.ask(BOB, 360, 3)
    assert load.steps_until(has_token(short)) <= 6
    assert 1 <= load.num_preempted - before <= 2
    assert running[0].status is Status.RUNNING


def test_each_of_many_short_requests_joins_and_the_long_ones_get_on() -> None:
    load = Load()
    mine = fill_pool(load, 400, 200)
    for _ in range(60):
        short = load.ask(BOB, 60, 3)
        assert load.steps_until(has_ended(short)) <= 6
    assert has_ended(mine[0])()
    load.steps_until(lambda: all(has_ended(each)() for each in mine), 20_000)


def test_a_callers_only_sequence_gives_way_and_gets_on() -> None:
    load = Load()
    giant = load.ask(ALICE, 3800, 190)
    load.run(40)
    assert len(giant.blocks) > 950
    shorts = []
    while not has_ended(giant)():
        shorts.append(load.ask(BOB, 200, 3))
        assert load.steps_until(has_ended(shorts[-1])) < LEAST_PROGRESS + 40
    assert 2 <= load.num_preempted <= 1 + 190 // LEAST_PROGRESS
    assert len(shorts) > 2


def test_a_newcomer_does_not_stop_the_only_stream_of_others() -> None:
    load = Load()
    streams = [load.ask(f"caller {number}", 180, 600) for number in range(16)]
    load.steps_until(lambda: load.scheduler.stats().blocks_used > 950)
    short = load.ask(BOB, 150, 1)
    load.run(5)
    assert load.num_preempted == 0
    assert all(each.status is Status.RUNNING for each in streams)
    load.steps_until(has_token(short))


def test_a_large_sequence_that_grows_gives_way_before_the_small_ones_of_others() -> None:
    load = Load(num_blocks=101)
    giant = load.ask(ALICE, 300, 90)
    load.run(4)
    small = [load.ask(BOB, 20, 60) for _ in range(3)]
    load.steps_until(lambda: load.num_preempted > 0)
    assert giant.status is Status.WAITING
    assert all(each.status is Status.RUNNING for each in small)
    load.steps_until(lambda: all(has_ended(each)() for each in (*small, giant)))


def test_a_full_batch_makes_a_place_for_a_newcomer() -> None:
    load = Load(max_batch_size=8)
    mine = [load.ask(ALICE, 4, 300) for _ in range(20)]
    load.run(5)
    short = load.ask(BOB, 20, 2)
    assert load.steps_until(has_token(short)) <= 2
    assert load.num_preempted == 1
    load.steps_until(lambda: all(has_ended(each)() for each in mine), 20_000)


def test_more_than_its_part_is_taken_from_nobody() -> None:
    load = Load()
    mine = fill_pool(load, 400)
    before = load.num_preempted
    load.ask(BOB, 2500)
    load.run(5)
    assert load.num_preempted == before
    assert mine[0].status is Status.RUNNING


def test_a_sequence_that_grows_preempts_the_caller_that_holds_most() -> None:
    load = Load(num_blocks=41)
    mine = load.ask(BOB, 30, 60)
    load.run()
    greedy = [load.ask(ALICE, 30, 60) for _ in range(4)]
    load.run(2)
    short = load.ask(CAROL, 6, 60)
    load.steps_until(lambda: load.num_preempted > 0)
    assert mine.status is short.status is greedy[0].status is Status.RUNNING
    load.steps_until(lambda: all(has_ended(each)() for each in (*greedy, mine, short)))


def test_trials_after_a_failed_step_are_as_they_were() -> None:
    load = Load()
    sequences = [load.ask(caller, 20, 3) for caller in (ALICE, BOB, CAROL, ALICE)]
    step = load.scheduler.schedule(0.0)
    assert step is not None
    load.scheduler.update(StepResults(step.number, error="boom"))
    load.steps_until(lambda: all(has_ended(each)() for each in sequences))


@settings(max_examples=25)
@given(st.integers(0, 2**32))
def test_whatever_others_send_a_first_short_request_joins_soon_and_everybody_ends(
    seed: int,
) -> None:
    choose = random.Random(seed)
    load = Load(
        num_blocks=choose.choice([200, 500, 3000]),
        max_step_tokens=choose.choice([64, 128, 512]),
        max_batch_size=choose.choice([8, 32, 64]),
        prefix_caching=choose.random() < 0.7,
        max_steps_in_flight=choose.choice([1, 2]),
    )
    room = load.scheduler.stats().blocks_total * BLOCK
    flooding = [str(number) for number in range(choose.choice([1, 2, 4]))]
    everybody: list[Sequence] = []
    waits = []
    short: Sequence | None = None
    since = 0
    for number in range(250):
        if choose.random() < 0.4 and load.scheduler.stats().waiting < 40:
            size = choose.randint(1, room // choose.choice([2, 3, 10]))
            kind = choose.choice([0, 0, 900 + choose.randint(0, 2)])
            everybody.append(
                load.ask(choose.choice(flooding), size, choose.randint(1, 90), prompt=kind)
            )
        if short is None and choose.random() < 0.2:
            short, since = load.ask(BOB, choose.randint(1, 30), choose.randint(1, 5)), number
            everybody.append(short)
        load.run()
        if short is not None and short.log.generated_ids:
            waits.append(number - since)
            short = None
    assert max(waits, default=0) <= 2 * LEAST_PROGRESS
    assert sum(waits) <= 4 * max(1, len(waits))
    load.steps_until(lambda: all(has_ended(each)() for each in everybody), 200_000)
    assert load.scheduler.is_idle
