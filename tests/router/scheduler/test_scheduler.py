"""What goes into a step, what comes out of a result."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import pytest

from kagami_proto.values import SamplingParams, Wanted
from kagami_router.request.prompt import Media, Prompt
from kagami_router.request.values import StoppingParams, ValidRequest
from kagami_router.scheduler.config import SchedulerConfig
from kagami_router.scheduler.scheduler import Scheduler
from kagami_router.scheduler.step import (
    Event,
    Failure,
    SequenceFailed,
    Step,
    StepResults,
    TokenSampled,
)

BLOCK = 4


def new_scheduler(**changes: object) -> Scheduler:
    limits = {"num_blocks": 65, "block_size": BLOCK, "max_step_tokens": 16, "max_batch_size": 8}
    return Scheduler(SchedulerConfig(**(limits | changes)))


def new_request(prompt: Sequence[int], max_new_tokens: int = 4, **changes: object) -> ValidRequest:
    return ValidRequest(
        Prompt(tuple(prompt), ""), SamplingParams(), StoppingParams(max_new_tokens), **changes
    )


def add(scheduler: Scheduler, prompt: Iterable[int], max_new_tokens: int = 4) -> int:
    return scheduler.add(new_request(list(prompt), max_new_tokens), 0.0).id


def schedule(scheduler: Scheduler) -> Step:
    step = scheduler.schedule(0.0)
    scheduler.check_integrity()
    assert step is not None
    return step


def answer(scheduler: Scheduler, step: Step, **changes: object) -> list[Event]:
    """Confirm a step: whoever wants a token gets the token 100."""
    samples = [
        (work.sequence.id, 100, -0.5, ()) for work in step.work if work.wanted is Wanted.ONE_TOKEN
    ]
    results = StepResults(step.number, **({"samples": samples} | changes))
    events = scheduler.update(results)
    scheduler.check_integrity()
    return events


def run_step(scheduler: Scheduler) -> list[Event]:
    return answer(scheduler, schedule(scheduler))


def shape(step: Step) -> list[tuple[int, int, int]]:
    return [(work.sequence.id, work.position, work.num_tokens) for work in step.work]


def run_dry(scheduler: Scheduler) -> list[Event]:
    events: list[Event] = []
    while (step := scheduler.schedule(0.0)) is not None:
        events += answer(scheduler, step)
    return events


def test_a_long_prompt_goes_in_chunks_and_its_last_samples() -> None:
    scheduler = new_scheduler()
    add(scheduler, range(20))
    first, second = schedule(scheduler), schedule(scheduler)
    assert (shape(first), shape(second)) == ([(1, 0, 16)], [(1, 16, 4)])
    assert [work.wanted for work in (*first.work, *second.work)] == [
        Wanted.NOTHING,
        Wanted.ONE_TOKEN,
    ]
    assert len(first.work[0].blocks) == 5


def test_a_decode_is_scheduled_before_its_token_is_known() -> None:
    scheduler = new_scheduler()
    add(scheduler, range(3))
    assert shape(schedule(scheduler)) == [(1, 0, 3)]
    assert shape(schedule(scheduler)) == [(1, 3, 1)]
    assert scheduler.schedule(0.0) is None


def test_decodes_come_first_and_prompts_share_the_rest() -> None:
    scheduler = new_scheduler()
    add(scheduler, range(3), 9)
    run_step(scheduler)
    add(scheduler, range(10, 20))
    add(scheduler, range(20, 40))
    step = schedule(scheduler)
    assert shape(step) == [(1, 3, 1), (2, 0, 10), (3, 0, 5)]
    assert (step.num_decodes, step.num_prefill_tokens) == (1, 15)
    assert shape(schedule(scheduler)) == [(1, 4, 1), (2, 10, 1), (3, 5, 14)]


def test_nothing_is_scheduled_past_the_last_token() -> None:
    scheduler = new_scheduler()
    add(scheduler, range(3), 2)
    first, second = schedule(scheduler), schedule(scheduler)
    events = answer(scheduler, first)
    assert scheduler.schedule(0.0) is None
    events += answer(scheduler, second)
    assert [event.is_last for event in events if isinstance(event, TokenSampled)] == [False, True]
    assert scheduler.is_idle


def test_what_ran_behind_the_end_is_discarded() -> None:
    scheduler = new_scheduler()
    add(scheduler, range(3))
    first, second = schedule(scheduler), schedule(scheduler)
    (event,) = answer(scheduler, first)
    scheduler.finish(event.sequence)
    assert answer(scheduler, second) == []
    assert scheduler.is_idle
    add(scheduler, range(5))
    assert schedule(scheduler).drop_ids == [1]


def test_cancel_frees_the_blocks() -> None:
    scheduler = new_scheduler()
    sequence_id = add(scheduler, range(20))
    schedule(scheduler)
    scheduler.cancel(sequence_id)
    scheduler.check_integrity()
    assert (scheduler.stats().blocks_used, scheduler.stats().running) == (0, 0)


def test_a_chunk_in_flight_is_not_in_the_cache() -> None:
    scheduler = new_scheduler()
    first = add(scheduler, range(16))
    schedule(scheduler)
    scheduler.cancel(first)
    add(scheduler, range(16))
    assert schedule(scheduler).new_sequences[0].num_cached_tokens == 0


def test_generated_tokens_are_cached_too() -> None:
    scheduler = new_scheduler()
    add(scheduler, range(3), 6)
    run_dry(scheduler)
    add(scheduler, [0, 1, 2, *[100] * 5, 7])
    assert schedule(scheduler).new_sequences[0].num_cached_tokens == 8


def test_of_a_prompt_found_whole_one_block_is_computed() -> None:
    scheduler = new_scheduler()
    add(scheduler, range(8))
    run_dry(scheduler)
    add(scheduler, range(8))
    assert shape(schedule(scheduler)) == [(2, 4, 4)]


def test_prompt_logprobs_need_every_token_computed() -> None:
    scheduler = new_scheduler()
    add(scheduler, range(8))
    run_dry(scheduler)
    scheduler.add(new_request(range(8), prompt_logprobs=True), 0.0)
    assert shape(schedule(scheduler)) == [(2, 0, 8)]


def blocks_given(scheduler: Scheduler, prompts: Iterable[Iterable[int]]) -> list[set[int]]:
    """Which blocks each prompt was given, one after the other; four each."""
    given = []
    for prompt in prompts:
        add(scheduler, prompt, 1)
        given.append(set(schedule(scheduler).work[0].blocks))
        answer(scheduler, scheduler._in_flight[0])
        run_dry(scheduler)
    return given


def prompts_without_a_common_prefix(count: int) -> list[range]:
    return [range(100 * index, 100 * index + 16) for index in range(count)]


def test_beyond_its_share_the_cache_is_given_up_before_fresh_blocks_are_used() -> None:
    scheduler = new_scheduler(cache_grows_to=9)
    given = blocks_given(scheduler, prompts_without_a_common_prefix(12))
    assert len(set().union(*given)) == 9 + 4


def test_without_a_share_the_cache_grows_into_the_whole_pool() -> None:
    scheduler = new_scheduler()
    given = blocks_given(scheduler, prompts_without_a_common_prefix(12))
    assert len(set().union(*given)) == 48


def test_running_sequences_use_fresh_blocks_whatever_is_cached() -> None:
    scheduler = new_scheduler(cache_grows_to=0)
    for prompt in prompts_without_a_common_prefix(6):
        add(scheduler, prompt, 20)
        run_step(scheduler)
    assert scheduler.stats().blocks_used == 6 * 4 + 5


def test_a_prefix_in_use_outlives_prompts_that_come_once() -> None:
    scheduler = new_scheduler(cache_grows_to=6)
    for prompt in prompts_without_a_common_prefix(12):
        for ids in (range(1000, 1012), prompt):
            add(scheduler, ids, 1)
            run_dry(scheduler)
    add(scheduler, range(1000, 1012))
    assert schedule(scheduler).new_sequences[0].num_cached_tokens == 8


def test_without_prefix_caching_nothing_is_found() -> None:
    scheduler = new_scheduler(prefix_caching=False)
    add(scheduler, range(8))
    run_dry(scheduler)
    add(scheduler, range(8))
    assert shape(schedule(scheduler)) == [(2, 0, 8)]
    assert scheduler.stats().blocks_cached == 0


def test_sixteen_requests_compute_their_common_prefix_once() -> None:
    scheduler = new_scheduler(
        num_blocks=2000, block_size=16, max_step_tokens=256, max_batch_size=16
    )
    for number in range(16):
        add(scheduler, [*range(1024), *range(5000 + 40 * number, 5032 + 40 * number)])
    num_computed = 0
    steps: list[Step] = []
    while not scheduler.is_idle:
        while (step := scheduler.schedule(0.0)) is not None:
            steps.append(step)
            num_computed += step.num_prefill_tokens
        answer(scheduler, steps.pop(0))
    assert num_computed == 1024 + 16 * 32


def test_another_prompt_passes_the_one_that_waits_for_a_prefix() -> None:
    scheduler = new_scheduler()
    add(scheduler, range(10))
    add(scheduler, range(12))
    add(scheduler, range(50, 54))
    assert [entry[0] for entry in shape(schedule(scheduler))] == [1, 3]


def test_who_waits_for_a_prefix_goes_on_when_its_computer_dies() -> None:
    scheduler = new_scheduler()
    first = add(scheduler, range(10))
    add(scheduler, range(12))
    schedule(scheduler)
    assert 2 not in [entry[0] for entry in shape(schedule(scheduler))]
    scheduler.cancel(first)
    answer(scheduler, scheduler._in_flight[0])
    assert shape(schedule(scheduler)) == [(2, 0, 12)]


def test_the_youngest_is_preempted_and_comes_back_with_its_tokens() -> None:
    scheduler = new_scheduler(num_blocks=6, max_batch_size=2)
    add(scheduler, range(7), 9)
    add(scheduler, range(20, 24), 9)
    steps = [schedule(scheduler)]
    while not steps[-1].preempted:
        answer(scheduler, steps[-1])
        steps.append(schedule(scheduler))
    assert [entry[0] for entry in shape(steps[-1])] == [1]
    assert steps[-1].drop_ids == [2]
    answer(scheduler, steps[-1])
    replays: list[tuple[int, list[int]]] = []
    events: list[Event] = []
    while (step := scheduler.schedule(0.0)) is not None:
        replays += [(new.id, new.token_ids) for new in step.new_sequences if new.is_replay]
        events += answer(scheduler, step)
    assert replays == [(2, [20, 21, 22, 23, *[100] * (len(replays[0][1]) - 4)])]
    assert [event.sequence.log.num_generated for event in events][-1] == 9


def test_a_preempted_sequence_keeps_the_token_that_was_in_flight() -> None:
    scheduler = new_scheduler(num_blocks=5, max_batch_size=2)
    add(scheduler, range(7), 6)
    add(scheduler, range(20, 23), 6)
    first, second = schedule(scheduler), schedule(scheduler)
    answer(scheduler, first)
    third = schedule(scheduler)
    assert len(third.preempted) == 1
    waiting = scheduler._queues.waiting[0]
    answer(scheduler, second)
    assert waiting.log.generated_ids == [100, 100]
    assert len(run_dry_from(scheduler, third)) > 0
    assert waiting.log.generated_ids == [100] * 6


def run_dry_from(scheduler: Scheduler, step: Step) -> list[Event]:
    return answer(scheduler, step) + run_dry(scheduler)


def test_a_failed_sequence_is_reported_and_not_found_in_the_cache() -> None:
    scheduler = new_scheduler()
    add(scheduler, range(9), 9)
    run_step(scheduler)
    step = schedule(scheduler)
    events = answer(scheduler, step, samples=[], failures=[Failure(1, "bad")])
    assert [(event.sequence.id, event.message) for event in events if is_failure(event)] == [
        (1, "bad")
    ]
    assert scheduler.stats().blocks_cached == 0


def is_failure(event: Event) -> bool:
    return isinstance(event, SequenceFailed)


def test_a_sequence_without_its_token_fails_instead_of_hanging() -> None:
    scheduler = new_scheduler()
    add(scheduler, range(3))
    (event,) = answer(scheduler, schedule(scheduler), samples=[])
    assert isinstance(event, SequenceFailed)


def test_a_failed_pass_puts_everybody_back_and_voids_the_step_behind_it() -> None:
    scheduler = new_scheduler()
    for start in (0, 20, 40, 60):
        add(scheduler, range(start, start + 3))
    first, second = schedule(scheduler), schedule(scheduler)
    assert answer(scheduler, first, samples=[], error="boom") == []
    assert scheduler.schedule(0.0) is None
    assert answer(scheduler, second) == []
    trial = schedule(scheduler)
    assert [entry[0] for entry in shape(trial)] == [1, 2]
    assert sorted(trial.drop_ids) == [1, 2, 3, 4]
    assert scheduler.schedule(0.0) is None


def test_the_culprit_is_found_by_halves() -> None:
    scheduler = new_scheduler()
    for start in range(8):
        add(scheduler, range(20 * start, 20 * start + 2))
    failed: list[Event] = []
    num_failed_steps = 0
    while (step := scheduler.schedule(0.0)) is not None:
        is_bad = any(work.sequence.id == 6 for work in step.work)
        num_failed_steps += is_bad
        changes = {"samples": [], "error": "boom"} if is_bad else {}
        failed += [event for event in answer(scheduler, step, **changes) if is_failure(event)]
    assert [(event.sequence.id, event.message) for event in failed] == [(6, "boom")]
    assert num_failed_steps == 4


def test_out_of_memory_makes_steps_smaller_until_they_fit() -> None:
    scheduler = new_scheduler(max_step_tokens=64)
    add(scheduler, range(60))
    sizes = []
    while (step := scheduler.schedule(0.0)) is not None:
        sizes.append(step.num_prefill_tokens + step.num_decodes)
        is_too_large = sizes[-1] > 20
        changes = {"samples": [], "error": "oom", "out_of_memory": True} if is_too_large else {}
        assert not any(map(is_failure, answer(scheduler, step, **changes)))
    assert sizes[:6] == [60, 30, 16, 16, 16, 12]


def test_the_size_of_steps_recovers() -> None:
    scheduler = new_scheduler()
    for start in range(8):
        add(scheduler, range(20 * start, 20 * start + 2), 40)
    answer(scheduler, schedule(scheduler), samples=[], error="boom")
    sizes = []
    while (step := scheduler.schedule(0.0)) is not None:
        sizes.append(len(step.work))
        answer(scheduler, step)
    assert (sizes[0], max(sizes)) == (4, 8)


@pytest.mark.parametrize(("num_waiting", "joins"), [(1, False), (2, True)])
def test_newcomers_wait_until_they_are_worth_an_interruption(num_waiting: int, joins: bool) -> None:
    scheduler = new_scheduler(waiting_served_ratio=0.5, max_waiting_tokens=100)
    for start in range(4):
        add(scheduler, range(20 * start, 20 * start + 2), 40)
    run_step(scheduler)
    for start in range(num_waiting):
        add(scheduler, range(200 + 20 * start, 202 + 20 * start))
    assert bool(schedule(scheduler).new_sequences) == joins


def test_a_newcomer_joins_after_max_waiting_tokens() -> None:
    scheduler = new_scheduler(waiting_served_ratio=5.0, max_waiting_tokens=3)
    add(scheduler, range(2), 40)
    run_step(scheduler)
    add(scheduler, range(50, 52))
    joined = []
    for _ in range(5):
        step = schedule(scheduler)
        joined.append(bool(step.new_sequences))
        answer(scheduler, step)
    assert joined == [False, False, False, True, False]


def test_stats_count_a_shared_block_once() -> None:
    scheduler = new_scheduler()
    add(scheduler, range(9), 20)
    run_step(scheduler)
    add(scheduler, range(9), 20)
    run_step(scheduler)
    stats = scheduler.stats()
    assert (stats.running, stats.waiting) == (2, 0)
    assert (stats.blocks_total, stats.blocks_used, stats.blocks_cached) == (64, 4, 0)


def test_what_can_never_fit_is_a_bug_of_validation() -> None:
    with pytest.raises(AssertionError):
        add(new_scheduler(num_blocks=3), range(8), 2)


@pytest.mark.parametrize(
    ("changes", "num_cached"), [({}, 8), ({"adapter": "fr"}, 0), ({"image": b"cat"}, 4)]
)
def test_equal_ids_are_found_only_under_the_same_adapter_and_media(
    changes: dict[str, object], num_cached: int
) -> None:
    scheduler = new_scheduler()
    add(scheduler, range(10))
    run_dry(scheduler)
    request = new_request(range(10), adapter=changes.get("adapter"))
    if image := changes.get("image"):
        prompt = replace(request.prompt, media=(Media(image, 6, 8),))
        request = replace(request, prompt=prompt)
    scheduler.add(request, 0.0)
    assert schedule(scheduler).new_sequences[0].num_cached_tokens == num_cached
