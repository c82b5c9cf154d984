"""Protobuf to records and back: the only file of the router that knows the fields of messages.

Steps become columns, results become records. Several shards answer one step: sampled tokens are
read from the first, and a failure counts whoever reports it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat

from kagami_proto import generate_pb2 as pb
from kagami_proto.values import DevicePolicy
from kagami_proto.wire import grammar_to_pb, policy_from_pb, sampling_to_pb, wanted_to_pb
from kagami_router.request.token_log import TopToken
from kagami_router.scheduler.step import (
    Failure,
    NewSequence,
    PromptLogprobs,
    Sample,
    Step,
    StepResults,
)
from kagami_router.telemetry.sequence_trace import WireContext


@dataclass(frozen=True, slots=True)
class ShardInfo:
    """Facts about the model and the device."""

    model_type: str
    dtype: str
    device_type: str
    attention: str
    vocab_size: int
    max_positions: int
    """0: unknown."""
    block_size: int
    eos_token_ids: frozenset[int]
    world_size: int
    version: str
    quantization: str
    """"int8", "gptq", …; empty: the weights are not quantized."""
    policy: DevicePolicy


@dataclass(frozen=True, slots=True)
class Pool:
    """The KV cache that fits all shards; block 0 is reserved."""

    num_blocks: int
    block_size: int
    kv_bytes: int
    """On one shard."""
    weight_bytes: int
    """On the shard that has most"""
    kv_token_bytes: int
    bandwidth: float
    """Bytes a second, of the slowest shard; 0: not measured"""


def info_from_pb(info: pb.InfoResponse) -> ShardInfo:
    """What a shard says of itself."""
    return ShardInfo(
        model_type=info.model_type,
        dtype=info.dtype,
        device_type=info.device_type,
        attention=info.attention,
        vocab_size=info.vocab_size,
        max_positions=info.max_positions,
        block_size=info.block_size,
        eos_token_ids=frozenset(info.eos_token_ids),
        world_size=info.world_size,
        version=info.version,
        quantization=info.quantization,
        policy=policy_from_pb(info.policy),
    )


def pool_from_pb(pools: Sequence[pb.WarmupResponse]) -> Pool:
    """What all shards can hold: the smallest pool and the slowest memory count."""
    smallest = min(pools, key=lambda pool: pool.num_blocks)
    return Pool(
        num_blocks=smallest.num_blocks,
        block_size=smallest.block_size,
        kv_bytes=smallest.kv_bytes,
        weight_bytes=max(pool.weight_bytes for pool in pools),
        kv_token_bytes=max(pool.kv_token_bytes for pool in pools),
        bandwidth=float(min(pool.read_bandwidth for pool in pools)),
    )


_NONE: tuple[tuple[()], ...] = ((),) * 5


def step_to_pb(step: Step, contexts: Mapping[int, WireContext] = {}) -> pb.Step:
    """Records become columns."""
    columns = zip(*step.work, strict=True) if step.work else _NONE
    sequences, positions, counts, blocks, wanted = columns
    ids = [sequence.id for sequence in sequences]
    message = pb.Step(number=step.number, ids=ids, positions=positions, counts=counts)
    if any(blocks):
        message.grants.extend(
            pb.BlockGrant(id=sequence_id, blocks=given)
            for sequence_id, given in zip(ids, blocks, strict=True)
            if given
        )
    # Decodes want one token each, which is 0.
    if (step.num_prefill_tokens or step.drafts) and any(wanted):
        message.wanted.extend(wanted_to_pb(wanted))
    for sequence_id, draft in step.drafts.items():
        message.drafts.append(pb.Draft(id=sequence_id, token_ids=draft))
    if step.drop_ids:
        message.drop_ids.extend(step.drop_ids)
    for new in step.new_sequences:
        message.new_sequences.append(_new_to_pb(new, contexts.get(new.id)))
    return message


def _new_to_pb(new: NewSequence, context: WireContext | None) -> pb.NewSequence:
    context = context or _NOT_TRACED
    return pb.NewSequence(
        id=new.id,
        token_ids=new.token_ids,
        num_prompt_tokens=new.num_prompt_tokens,
        sampling=sampling_to_pb(new.request.sampling),
        grammar=grammar_to_pb(new.request.grammar) if new.request.grammar else None,
        top_n_tokens=new.request.top_n_tokens,
        prompt_logprobs=new.prompt_logprobs,
        adapter_id=new.request.adapter or "",
        traceparent=context.traceparent,
        tracestate=context.tracestate,
        decode_span_id=context.decode_span_id,
    )


_NOT_TRACED = WireContext("", "", 0)


def results_from_pb(messages: Sequence[pb.StepResult]) -> StepResults:
    """What all shards say of one step: the first one's tokens, everybody's failures."""
    first = messages[0]
    none = repeat((), len(first.ids))
    # A row that is not whole is no row: its sequence got no token, which the scheduler sees.
    samples: list[Sample] = list(
        zip(first.ids, first.token_ids, first.logprobs, none, strict=False)
    )
    for top in first.top_tokens:
        alternatives = tuple(map(TopToken, top.token_ids, top.logprobs))
        samples[top.index] = (*samples[top.index][:3], alternatives)
    results = StepResults(
        first.number,
        samples,
        [_prompt_logprobs_from_pb(scored) for scored in first.prompt_logprobs],
        [Failure(failure.id, failure.message) for failure in first.failures],
        first.error,
        first.out_of_memory,
        first.host_ns,
        first.device_ns,
        first.sampling_ns,
        first.admission_ns,
        first.spans_dropped,
        [(vector.id, tuple(vector.values)) for vector in first.vectors],
    )
    for other in messages[1:]:
        results = _with_another(results, other)
    return results


def _with_another(results: StepResults, other: pb.StepResult) -> StepResults:
    """What one more shard says of the same step: who is slowest counts, and who fails."""
    failures = [Failure(failure.id, failure.message) for failure in other.failures]
    return results._replace(
        failures=[*results.failures, *failures],
        error=results.error or other.error,
        out_of_memory=results.out_of_memory or other.out_of_memory,
        host_ns=max(results.host_ns, other.host_ns),
        device_ns=max(results.device_ns, other.device_ns),
        sampling_ns=max(results.sampling_ns, other.sampling_ns),
        admission_ns=max(results.admission_ns, other.admission_ns),
        spans_dropped=results.spans_dropped + other.spans_dropped,
    )


def _prompt_logprobs_from_pb(scored: pb.PromptLogprobs) -> PromptLogprobs:
    width = scored.top_n
    flat = list(map(TopToken, scored.top_token_ids, scored.top_logprobs))
    return PromptLogprobs(
        scored.id,
        scored.first_position,
        list(scored.logprobs),
        [tuple(flat[start : start + width]) for start in range(0, len(flat), width or 1)],
    )
