from dataclasses import fields

import pytest

from kagami_proto import generate_pb2 as pb
from kagami_proto.values import DEVICE_POLICIES, Grammar, GrammarKind, SamplingParams, Wanted
from kagami_proto.wire import (
    grammar_from_pb,
    grammar_to_pb,
    policy_from_pb,
    policy_to_pb,
    sampling_from_pb,
    sampling_to_pb,
    wanted_from_pb,
    wanted_to_pb,
)

# Every field differs from its default, and float32 holds every value exactly.
UNUSUAL = SamplingParams(
    do_sample=True,
    seed=2**64 - 1,
    temperature=0.5,
    top_k=7,
    top_p=0.25,
    typical_p=0.75,
    min_p=0.125,
    repetition_penalty=1.5,
    frequency_penalty=-0.5,
    presence_penalty=0.125,
    logit_bias=((0, -100.0), (49151, 2.5)),
    watermark=True,
)


@pytest.mark.parametrize("params", [SamplingParams(), UNUSUAL])
def test_sampling_parameters_come_back_as_they_were_sent(params: SamplingParams) -> None:
    sent = sampling_to_pb(params).SerializeToString()

    assert sampling_from_pb(pb.SamplingParams.FromString(sent)) == params


def test_the_unusual_parameters_leave_no_field_at_its_default() -> None:
    usual = SamplingParams()

    for field in fields(SamplingParams):
        assert getattr(UNUSUAL, field.name) != getattr(usual, field.name), field.name


def test_bias_columns_of_unequal_length_are_refused() -> None:
    with pytest.raises(ValueError, match="shorter"):
        sampling_from_pb(pb.SamplingParams(bias_ids=[1, 2], biases=[0.5]))


@pytest.mark.parametrize("kind", GrammarKind)
def test_grammars_come_back_as_they_were_sent(kind: GrammarKind) -> None:
    grammar = Grammar(kind, "source")

    sent = grammar_to_pb(grammar).SerializeToString()

    assert grammar_from_pb(pb.Grammar.FromString(sent)) == grammar


def test_each_kind_of_grammar_has_its_own_number() -> None:
    numbers = {grammar_to_pb(Grammar(kind, "")).kind for kind in GrammarKind}

    assert numbers == set(pb.Grammar.Kind.values())


@pytest.mark.parametrize("device_type", DEVICE_POLICIES)
def test_a_devices_policy_comes_back_as_it_was_sent(device_type: str) -> None:
    policy = DEVICE_POLICIES[device_type]
    sent = policy_to_pb(policy).SerializeToString()

    assert policy_from_pb(pb.DevicePolicy.FromString(sent)) == policy


def test_what_work_wants_comes_back_as_it_was_sent() -> None:
    sent = pb.Step(wanted=wanted_to_pb(Wanted)).SerializeToString()

    assert wanted_from_pb(pb.Step.FromString(sent).wanted) == list(Wanted)
    assert set(wanted_to_pb(Wanted)) == set(pb.Wanted.values())
