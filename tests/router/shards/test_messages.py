"""Records to protobuf and back."""

from kagami_proto import generate_pb2 as pb
from kagami_proto.values import SamplingParams
from kagami_router.request.prompt import Prompt
from kagami_router.request.values import StoppingParams, ValidRequest
from kagami_router.scheduler.config import SchedulerConfig
from kagami_router.scheduler.scheduler import Scheduler
from kagami_router.scheduler.step import (
    Failure,
    PromptLogprobs,
    Step,
)
from kagami_router.shards.messages import results_from_pb, step_to_pb
from kagami_router.telemetry.sequence_trace import WireContext


def new_step() -> Step:
    scheduler = Scheduler(
        SchedulerConfig(num_blocks=9, block_size=4, max_step_tokens=8, max_batch_size=4)
    )
    request = ValidRequest(
        Prompt((5, 6, 7, 8, 9), ""),
        SamplingParams(
            do_sample=True,
            seed=2**64 - 1,
            temperature=0.5,
            top_k=3,
            logit_bias=((7, -2.0), (9, 1.5)),
        ),
        StoppingParams(4),
        top_n_tokens=2,
        prompt_logprobs=True,
    )
    scheduler.add(request, 0.0)
    step = scheduler.schedule(0.0)
    assert step is not None
    return step


def new_request(prompt: bytes, max_new_tokens: int, **changes: object) -> ValidRequest:
    stopping = StoppingParams(max_new_tokens)
    return ValidRequest(Prompt(tuple(prompt), ""), SamplingParams(), stopping, **changes)


def test_a_step_becomes_columns() -> None:
    message = step_to_pb(new_step())
    assert (list(message.ids), list(message.positions), list(message.counts)) == ([1], [0], [5])
    assert [(grant.id, list(grant.blocks)) for grant in message.grants] == [(1, [1, 2])]


def test_a_new_sequence_carries_all_the_shard_needs() -> None:
    context = WireContext("00-a-b-01", "c=d", 2**64 - 1)
    (new,) = step_to_pb(new_step(), {1: context}).new_sequences
    assert (new.traceparent, new.tracestate, new.decode_span_id) == context
    assert (list(new.token_ids), new.num_prompt_tokens) == ([5, 6, 7, 8, 9], 5)
    assert (new.sampling.seed, new.sampling.temperature, new.sampling.top_k) == (2**64 - 1, 0.5, 3)
    assert (list(new.sampling.bias_ids), list(new.sampling.biases)) == ([7, 9], [-2.0, 1.5])
    assert (new.top_n_tokens, new.prompt_logprobs) == (2, True)


def test_results_become_records() -> None:
    message = pb.StepResult(
        number=3,
        ids=[1, 2],
        token_ids=[7, 8],
        logprobs=[-1.0, -2.0],
        top_tokens=[pb.TopTokens(index=1, token_ids=[8, 9], logprobs=[-2.0, -3.0])],
        prompt_logprobs=[
            pb.PromptLogprobs(id=1, first_position=1, logprobs=[-0.5]),
            pb.PromptLogprobs(
                id=2,
                first_position=3,
                logprobs=[-0.5, -0.25],
                top_n=2,
                top_token_ids=[4, 5, 6, 7],
                top_logprobs=[-0.5, -1.0, -0.25, -1.5],
            ),
        ],
        failures=[pb.SequenceFailure(id=4, message="bad")],
        host_ns=5,
    )
    results = results_from_pb([message])
    assert [sample[:3] for sample in results.samples] == [(1, 7, -1.0), (2, 8, -2.0)]
    assert [len(sample[3]) for sample in results.samples] == [0, 2]
    assert results.prompt_logprobs == [
        PromptLogprobs(1, 1, [-0.5], []),
        PromptLogprobs(2, 3, [-0.5, -0.25], [((4, -0.5), (5, -1.0)), ((6, -0.25), (7, -1.5))]),
    ]
    assert results.failures == [Failure(4, "bad")]
    assert (results.number, results.host_ns) == (3, 5)


def test_any_shards_failure_counts() -> None:
    good, bad = pb.StepResult(number=1, ids=[1]), pb.StepResult(number=1, error="boom")
    assert results_from_pb([good, bad]).error == "boom"


def test_an_adapter_is_named_on_the_wire() -> None:
    scheduler = Scheduler(
        SchedulerConfig(num_blocks=9, block_size=4, max_step_tokens=8, max_batch_size=4)
    )
    scheduler.add(new_request(b"abc", 4, adapter="fr"), 0.0)
    scheduler.add(new_request(b"abc", 4), 0.0)
    step = scheduler.schedule(0.0)
    assert [new.adapter_id for new in step_to_pb(step).new_sequences] == ["fr", ""]


def test_a_step_whose_work_wants_one_token_each_says_nothing_of_it() -> None:
    assert not step_to_pb(new_step()).wanted
