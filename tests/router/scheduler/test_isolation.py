"""Who may run: everybody as usual, and the suspects after a failed step."""

from kagami_proto.values import SamplingParams, Wanted
from kagami_router.request.prompt import Prompt
from kagami_router.request.token_log import TokenLog
from kagami_router.request.values import StoppingParams, ValidRequest
from kagami_router.scheduler.isolation import AsUsual, FaultIsolation, OnTrial
from kagami_router.scheduler.prefix_cache import PrefixKey
from kagami_router.scheduler.sequence import Sequence, Status
from kagami_router.scheduler.step import WorkItem


def new_sequences(count: int, status: Status = Status.RUNNING) -> list[Sequence]:
    request = ValidRequest(Prompt((1, 2), ""), SamplingParams(), StoppingParams(4))
    return [
        Sequence(
            number, request, TokenLog((1, 2)), PrefixKey((1, 2)), 5, added_at=0.0, status=status
        )
        for number in range(1, count + 1)
    ]


def test_as_usual_everybody_may_run_and_nobody_is_a_bystander() -> None:
    running = new_sequences(3)
    usual = AsUsual(2)
    assert usual.may_run(running) == running
    assert usual.bystander(running) is None
    assert usual.num_spare_blocks(running) == 3
    assert (usual.max_steps_in_flight, usual.joins_at_once) == (2, False)


def test_on_trial_others_give_up_their_blocks_youngest_first() -> None:
    running = new_sequences(4)
    trial = OnTrial([running[1], running[3]])
    assert trial.may_run(running) == [running[1], running[3]]
    assert trial.bystander(running) is running[2]
    assert trial.bystander([running[1]]) is None
    assert trial.num_spare_blocks(running) == 0


def test_on_trial_only_suspects_may_join() -> None:
    suspect, other = new_sequences(2, Status.WAITING)
    assert OnTrial([suspect]).may_join([suspect, other]) == [suspect]


def test_a_failed_step_puts_the_older_half_on_trial_first() -> None:
    isolation = FaultIsolation(max_batch_size=8, max_step_tokens=64, max_steps_in_flight=2)
    sequences = new_sequences(4)
    isolation.step_failed(
        [WorkItem(each, 0, 2, (), Wanted.ONE_TOKEN) for each in sequences], out_of_memory=False
    )
    assert isolation.eligible().may_run(sequences) == sequences[:2]
    for cleared in sequences:
        cleared.num_confirmed = 2
    isolation.step_succeeded()
    assert isolation.eligible().may_run(sequences) == sequences[2:]
    isolation.step_succeeded()
    assert isinstance(isolation.eligible(), AsUsual)
