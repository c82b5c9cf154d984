"""The values of `values.py` to the wire and back; each converter stands beside its inverse."""

from collections.abc import Iterable, Mapping

from kagami_proto import generate_pb2 as pb
from kagami_proto.values import DevicePolicy, Grammar, GrammarKind, SamplingParams, Wanted

_KINDS: Mapping[GrammarKind, pb.Grammar.Kind.ValueType] = {
    GrammarKind.JSON_SCHEMA: pb.Grammar.JSON_SCHEMA,
    GrammarKind.REGEX: pb.Grammar.REGEX,
    GrammarKind.LARK: pb.Grammar.LARK,
}
_KINDS_BY_NUMBER = {number: kind for kind, number in _KINDS.items()}
_WANTED: Mapping[Wanted, pb.Wanted.ValueType] = {
    Wanted.ONE_TOKEN: pb.ONE_TOKEN,
    Wanted.NOTHING: pb.NOTHING,
    Wanted.VERIFY: pb.VERIFY,
    Wanted.VECTOR: pb.VECTOR,
}
_WANTED_BY_NUMBER = {number: wanted for wanted, number in _WANTED.items()}


def sampling_to_pb(params: SamplingParams) -> pb.SamplingParams:
    """`params` as the wire has them; the biases become two columns."""
    return pb.SamplingParams(
        do_sample=params.do_sample,
        seed=params.seed,
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        typical_p=params.typical_p,
        min_p=params.min_p,
        repetition_penalty=params.repetition_penalty,
        frequency_penalty=params.frequency_penalty,
        presence_penalty=params.presence_penalty,
        bias_ids=[token_id for token_id, _ in params.logit_bias],
        biases=[bias for _, bias in params.logit_bias],
        watermark=params.watermark,
    )


def sampling_from_pb(message: pb.SamplingParams) -> SamplingParams:
    """The inverse of `sampling_to_pb`; raises ValueError if the bias columns differ in length."""
    return SamplingParams(
        do_sample=message.do_sample,
        seed=message.seed,
        temperature=message.temperature,
        top_k=message.top_k,
        top_p=message.top_p,
        typical_p=message.typical_p,
        min_p=message.min_p,
        repetition_penalty=message.repetition_penalty,
        frequency_penalty=message.frequency_penalty,
        presence_penalty=message.presence_penalty,
        logit_bias=tuple(zip(message.bias_ids, message.biases, strict=True)),
        watermark=message.watermark,
    )


def grammar_to_pb(grammar: Grammar) -> pb.Grammar:
    """`grammar` as the wire has it."""
    return pb.Grammar(kind=_KINDS[grammar.kind], source=grammar.source)


def grammar_from_pb(message: pb.Grammar) -> Grammar:
    """The inverse of `grammar_to_pb`; raises KeyError on a kind that is not known."""
    return Grammar(_KINDS_BY_NUMBER[message.kind], message.source)


def policy_to_pb(policy: DevicePolicy) -> pb.DevicePolicy:
    """`policy` as the wire has it."""
    return pb.DevicePolicy(
        steps_in_flight=policy.steps_in_flight,
        prefill_chunk=policy.prefill_chunk,
        warmup_tokens=policy.warmup_tokens,
        warmup_rows=policy.warmup_rows,
        pool_tokens=policy.pool_tokens,
        cache_share=policy.cache_share,
    )


def policy_from_pb(message: pb.DevicePolicy) -> DevicePolicy:
    """The inverse of `policy_to_pb`."""
    return DevicePolicy(
        steps_in_flight=message.steps_in_flight,
        prefill_chunk=message.prefill_chunk,
        warmup_tokens=message.warmup_tokens,
        warmup_rows=message.warmup_rows,
        pool_tokens=message.pool_tokens,
        cache_share=message.cache_share,
    )


def wanted_to_pb(column: Iterable[Wanted]) -> list[pb.Wanted.ValueType]:
    """`Step.wanted`; where all want one token the column stays empty, and this is not called."""
    return [_WANTED[wanted] for wanted in column]


def wanted_from_pb(column: Iterable[pb.Wanted.ValueType]) -> list[Wanted]:
    """The inverse of `wanted_to_pb`; raises KeyError on what is not known."""
    return [_WANTED_BY_NUMBER[number] for number in column]
