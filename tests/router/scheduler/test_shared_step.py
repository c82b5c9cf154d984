"""What each caller gets of a step, and who may pass whom."""

from tests.fakes.callers import ALICE, BOB, CAROL, Load, has_ended, has_token

from kagami_router.scheduler.sequence import Status
from kagami_router.scheduler.shared_step import MAX_PASSES


def test_a_step_is_shared_evenly() -> None:
    load = Load()
    for caller in (ALICE, ALICE, ALICE, BOB):
        load.ask(caller, 300)
    load.run()
    assert load.computed() == {ALICE: 64, BOB: 64}
    load.ask(CAROL, 300)
    load.run()
    assert sorted(load.computed().values()) == [42, 43, 43]


def test_what_one_does_not_need_goes_to_the_others() -> None:
    load = Load()
    load.ask(ALICE, 300)
    load.ask(BOB, 10)
    load.ask(CAROL, 300)
    load.run()
    tokens = load.computed()
    assert tokens[BOB] == 10
    assert sum(tokens.values()) == 128
    assert min(tokens[ALICE], tokens[CAROL]) >= 42


def test_what_a_caller_cannot_use_goes_to_the_others() -> None:
    """Its next request has no room, and its part of the step is not wasted on it."""
    load = Load(num_blocks=101)
    load.ask(ALICE, 200)
    load.ask(BOB, 4, 50)
    load.run()
    load.ask(BOB, 300)
    load.run()
    assert load.computed() == {ALICE: 76}
    assert load.num_preempted == 0


def test_within_a_caller_the_oldest_goes_first() -> None:
    load = Load()
    mine = [load.ask(ALICE, 100) for _ in range(4)]
    load.ask(BOB, 900)
    ended = []
    for _ in range(40):
        load.run()
        ended += [each for each in mine if has_ended(each)() and each not in ended]
    assert ended == mine


def test_tokens_are_shared_over_time_where_a_step_is_too_small_for_all() -> None:
    load = Load(max_step_tokens=32, max_batch_size=16)
    for caller in "abcde":
        for _ in range(20):
            load.ask(caller, 100)
    total: dict[str, int] = {}
    for _ in range(50):
        load.run()
        for caller, tokens in load.computed().items():
            total[caller] = total.get(caller, 0) + tokens
    assert len(total) == 5
    assert max(total.values()) - min(total.values()) <= 2 * 32


def test_a_caller_that_comes_back_has_no_credit_from_the_time_before() -> None:
    load = Load(max_step_tokens=32, max_batch_size=8)
    idle = load.ask(BOB, 1, 1000)
    load.run(2)
    for _ in range(8):
        load.ask(ALICE, 300)
        load.ask(CAROL, 300)
    load.run(60)
    assert not has_ended(idle)()
    for _ in range(4):
        load.ask(BOB, 300)
    total: dict[str, int] = {}
    for _ in range(24):
        load.run()
        for caller, tokens in load.computed().items():
            total[caller] = total.get(caller, 0) + tokens
    assert max(total.values()) - min(total.values()) <= 2 * 32


def test_a_large_prompt_is_passed_by_so_many_newcomers_and_no_more() -> None:
    load = Load()
    stream = load.ask(ALICE, 100, 3000)
    load.run(2)
    large = load.ask(BOB, 3950, 1)
    passing = []
    for number in range(1000):
        passing.append(load.ask(f"caller {number}", 40, 4))
        load.run()
        if stream.status is Status.ENDED or large.status is not Status.WAITING:
            break
        if len(stream.log.generated_ids) == 200:
            load.scheduler.cancel(stream.id)
    num_passed = sum(has_token(each)() for each in passing)
    assert large.status is not Status.WAITING
    assert MAX_PASSES <= num_passed <= MAX_PASSES + 4
    load.steps_until(lambda: all(has_ended(each)() for each in passing))


def test_newcomers_that_fit_beside_it_still_pass_one_that_is_overdue() -> None:
    load = Load()
    stream = load.ask(ALICE, 100, 3000)
    load.run(2)
    large = load.ask(BOB, 3000, 1)
    large.times_passed = MAX_PASSES
    load.run(2)
    assert large.status is Status.RUNNING
    overdue = load.ask(CAROL, 3000, 100)
    overdue.times_passed = MAX_PASSES
    load.ask("big", 900, 500)
    for number in range(20):
        short = load.ask(f"caller {number}", 60, 20)
        assert load.steps_until(has_token(short)) <= 3
    assert not has_ended(stream)()
    load.steps_until(has_token(overdue), 4000)


def test_overdue_ones_take_turns_by_age() -> None:
    load = Load(num_blocks=201)
    load.ask(ALICE, 700, 40)
    load.run()
    late = [load.ask(caller, size, 5) for caller, size in (("a", 750), ("b", 500), ("c", 770))]
    for each in late:
        each.times_passed = MAX_PASSES
    load.ask("d", 400)
    order = []
    for _ in range(400):
        load.run()
        order += [each for each in late if has_token(each)() and each not in order]
    assert order == late


def test_who_needs_a_prefix_that_a_slow_caller_computes_pays_for_it() -> None:
    load = Load(max_step_tokens=32, max_batch_size=16)
    for _ in range(6):
        load.ask(ALICE, 900)
    load.run(100)
    shared = load.ask(ALICE, 900, prompt=500)
    load.steps_until(lambda: shared.status is Status.RUNNING, 5000)
    for number in range(6):
        load.ask(f"caller {number}", 900)
        load.ask(f"caller {number}", 900)
    mine = load.ask(BOB, 200, prompt=500)
    assert load.steps_until(has_token(mine)) <= 100
