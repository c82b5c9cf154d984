import asyncio
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from tests.fakes.byte_tokenizer import byte_tokenizer_with_start
from tests.fakes.fake_server import LIMITS

from kagami_proto.errors import InvalidRequest
from kagami_proto.values import MAX_GRAMMAR_BYTES, Grammar, GrammarKind, SamplingParams
from kagami_router.request.validation import (
    MAX_SEED,
    GenerationParams,
    Validation,
    samples,
)
from kagami_router.text.encode_queue import EncodeQueue
from kagami_router.text.tokenizer import INLINE_CHARACTERS, Tokenizer


@pytest.fixture
def validation() -> Iterator[Validation]:
    with ThreadPoolExecutor(1) as threads:
        yield Validation(Tokenizer(byte_tokenizer_with_start(), EncodeQueue(threads, 1)), LIMITS)


P = GenerationParams

# In TGI's order; all of them come before the prompt is looked at.
RULES = [
    (P(best_of=2), "you must use sampling when `best_of` is > 1"),
    (P(temperature=0.0), "`temperature` must be strictly positive"),
    (P(temperature=-1.0), "`temperature` must be strictly positive"),
    (P(temperature=1e-60), "`temperature` must be strictly positive"),
    (P(temperature=1e60), "`temperature` is out of range. Given: 1e+60"),
    (P(repetition_penalty=0.0), "`repetition_penalty` must be strictly positive"),
    (P(frequency_penalty=2.5), "`frequency_penalty` must be >= -2.0 and <= 2.0"),
    (P(frequency_penalty=-2.5), "`frequency_penalty` must be >= -2.0 and <= 2.0"),
    (P(presence_penalty=2.5), "`presence_penalty` must be >= -2.0 and <= 2.0"),
    (P(top_p=0.0), "`top_p` must be > 0.0 and < 1.0"),
    (P(top_p=1.0), "`top_p` must be > 0.0 and < 1.0"),
    (P(typical_p=1.0), "`typical_p` must be > 0.0 and < 1.0"),
    (P(top_k=0), "`top_k` must be strictly positive"),
    (P(top_k=-1), "`top_k` must be strictly positive"),
    (P(max_new_tokens=0), "`max_new_tokens` must be strictly positive"),
    (P(stop=("a",) * 5), "`stop` supports up to 4 stop sequences. Given: 5"),
    (
        P(best_of=2, do_sample=True, seed=1),
        "`seed` must not be set when `best_of` > 1",
    ),
    (P(top_n_tokens=6), "`top_n_tokens` must be >= 0 and <= 5. Given: 6"),
    (
        P(logit_bias=((5, 1.0), (300, 1.0))),
        "`logit_bias` has ids of the vocabulary, >= 0 and < 300. Given: 300",
    ),
    (
        P(logit_bias=((5, -100.5),)),
        "`logit_bias` must be >= -100 and <= 100. Given: -100.5 for the id 5",
    ),
    (P(seed=MAX_SEED + 1), f"`seed` must be <= {MAX_SEED}. Given: {MAX_SEED + 1}"),
]


@pytest.mark.parametrize(("params", "text"), RULES)
async def test_parameters_are_refused_with_tgis_text(
    validation: Validation, params: GenerationParams, text: str
) -> None:
    with pytest.raises(InvalidRequest) as refused:
        await validation.validate("", params, add_special_tokens=True)
    assert str(refused.value) == text


@pytest.mark.parametrize(
    ("prompt", "params", "text"),
    [
        ("", P(truncate=0), "`inputs` cannot be empty"),
        ("a", P(truncate=0), "`truncate` must be strictly positive and less than 63. Given: 0"),
        ("a", P(truncate=64), "`truncate` must be strictly positive and less than 63. Given: 64"),
        (
            "a" * 9,
            P(max_new_tokens=55),
            "`inputs` tokens + `max_new_tokens` must be <= 64."
            " Given: 10 `inputs` tokens and 55 `max_new_tokens`",
        ),
        (
            "a" * 70,
            P(),
            "`inputs` tokens + `max_new_tokens` must be <= 64."
            " Given: 71 `inputs` tokens and 0 `max_new_tokens`",
        ),
        ("a" * 63, P(), "`inputs` must have less than 63 tokens. Given: 64"),
        ("a", P(grammar={"type": "regex"}), "grammar is not supported"),
        ("a", P(unsupported={"adapter_id": "x"}), "`adapter_id` is not supported yet"),
    ],
)
async def test_lengths_are_refused_with_tgis_text(
    validation: Validation, prompt: str, params: GenerationParams, text: str
) -> None:
    with pytest.raises(InvalidRequest) as refused:
        await validation.validate(prompt, params, add_special_tokens=True)
    assert str(refused.value) == text


@pytest.mark.parametrize(
    ("params", "text"),
    [
        (P(temperature=0.0, repetition_penalty=0.0), RULES[1][1]),
        (P(repetition_penalty=0.0, frequency_penalty=3.0), RULES[5][1]),
        (P(frequency_penalty=3.0, top_p=0.0), RULES[6][1]),
        (P(top_p=0.0, typical_p=0.0), RULES[9][1]),
        (P(typical_p=1.0, top_k=0), RULES[11][1]),
        (P(top_k=0, max_new_tokens=0), RULES[12][1]),
        (P(max_new_tokens=0, stop=("a",) * 5), RULES[14][1]),
        (P(stop=("a",) * 5, best_of=2, seed=1, do_sample=True), RULES[15][1]),
        (P(best_of=2, seed=1, do_sample=True, top_n_tokens=6), RULES[16][1]),
        (P(top_n_tokens=6, truncate=0), RULES[17][1]),
    ],
)
async def test_the_first_broken_rule_wins(
    validation: Validation, params: GenerationParams, text: str
) -> None:
    with pytest.raises(InvalidRequest) as refused:
        await validation.validate("", params, add_special_tokens=True)
    assert str(refused.value) == text


@pytest.mark.parametrize(
    ("params", "text"),
    [
        (P(best_of=2), "`best_of` != 1 is not supported when streaming tokens"),
        (
            P(prompt_logprobs=True),
            "`decoder_input_details` == true is not supported when streaming tokens",
        ),
    ],
)
def test_streams_refuse_what_needs_a_whole_answer(
    validation: Validation, params: GenerationParams, text: str
) -> None:
    with pytest.raises(InvalidRequest) as refused:
        validation.check_stream(params)
    assert str(refused.value) == text


def test_best_of_0_is_1_in_streams_as_elsewhere(validation: Validation) -> None:
    validation.check_stream(P(best_of=0))
    validation.check_best_of(P(best_of=0))
    assert P(best_of=0).num_samples == 1


def test_best_of_is_limited(validation: Validation) -> None:
    with pytest.raises(InvalidRequest, match=r"`best_of` must be > 0 and <= 2. Given: 3"):
        validation.check_best_of(P(best_of=3))


def test_best_of_can_be_forbidden(validation: Validation) -> None:
    strict = Validation(validation._tokenizer, replace(LIMITS, max_best_of=1))
    with pytest.raises(InvalidRequest, match="`best_of` != 1 is not allowed for this endpoint"):
        strict.check_best_of(P(best_of=2))


async def test_an_equal_length_is_accepted_and_the_default_is_the_rest_of_the_context(
    validation: Validation,
) -> None:
    valid = await validation.validate("a" * 62, P(), add_special_tokens=True)
    assert len(valid.prompt_ids) == 63
    assert valid.stopping.max_new_tokens == 1


async def test_an_answer_that_may_be_shortened_ends_with_the_context(
    validation: Validation,
) -> None:
    params = P(max_new_tokens=500, may_be_shortened=True)
    valid = await validation.validate("a" * 9, params, add_special_tokens=True)
    assert valid.stopping.max_new_tokens == 54


async def test_truncate_keeps_the_last_tokens(validation: Validation) -> None:
    valid = await validation.validate("abcd" * 30, P(truncate=2), add_special_tokens=True)
    whole = await validation.validate("cd", P(), add_special_tokens=False)
    assert valid.prompt_ids == whole.prompt_ids


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        (P(), False),
        (P(do_sample=True), True),
        (P(temperature=1.0), False),
        (P(temperature=0.8), True),
        (P(top_k=10), True),
        (P(top_p=0.95), True),
        (P(typical_p=0.95), True),
        (P(min_p=0.05), True),
        (P(min_p=0.0), False),
        (P(repetition_penalty=1.2), False),
    ],
)
async def test_when_a_sequence_samples(
    validation: Validation, params: GenerationParams, expected: bool
) -> None:
    valid = await validation.validate("a", params, add_special_tokens=True)
    assert valid.sampling.do_sample is expected


async def test_floats_are_what_the_shard_will_see(validation: Validation) -> None:
    valid = await validation.validate("a", P(temperature=0.1), add_special_tokens=True)
    assert valid.sampling.temperature == 0.10000000149011612


@pytest.mark.parametrize(("given", "used"), [(1e-40, 1e-4), (1.5, 1.5), (1e38, 1e4)])
async def test_a_repetition_penalty_cannot_make_a_logit_infinite(
    validation: Validation, given: float, used: float
) -> None:
    valid = await validation.validate("a", P(repetition_penalty=given), add_special_tokens=True)
    assert valid.sampling.repetition_penalty == used


@pytest.mark.parametrize("neutral", [None, "", False])
async def test_neutral_values_of_what_is_not_supported_pass(
    validation: Validation, neutral: object
) -> None:
    await validation.validate("a", P(unsupported={"x": neutral}), add_special_tokens=True)


async def test_drawn_seeds_use_the_whole_range(validation: Validation) -> None:
    seeds = [
        (await validation.validate("a", P(do_sample=True), add_special_tokens=True)).sampling.seed
        for _ in range(64)
    ]
    assert len(set(seeds)) == 64
    assert max(seeds) > 2**63


async def test_samples_differ_in_their_seed_only(validation: Validation) -> None:
    valid = await validation.validate(
        "a", P(seed=MAX_SEED, do_sample=True), add_special_tokens=True
    )
    first, second = samples(valid, 2)
    assert first == valid
    assert second.sampling == SamplingParams(do_sample=True, seed=0)
    assert replace(second, sampling=valid.sampling) == valid


async def test_empty_stop_strings_are_left_out(validation: Validation) -> None:
    valid = await validation.validate("a", P(stop=("", "b")), add_special_tokens=True)
    assert valid.stopping.stop == ("b",)


async def test_long_prompts_are_encoded_on_a_thread(validation: Validation) -> None:
    valid = await validation.validate(
        "a" * (INLINE_CHARACTERS + 1), P(truncate=3), add_special_tokens=True
    )
    assert len(valid.prompt_ids) == 3


@pytest.mark.parametrize(
    ("params", "error"),
    [
        (P(), "`inputs` tokens + `max_new_tokens` must be <= 64. Given: at least 3000 `inputs`"),
        (
            P(max_new_tokens=10),
            "`inputs` tokens + `max_new_tokens` must be <= 64. Given: at least 3000 `inputs`"
            " tokens and 10 `max_new_tokens`",
        ),
    ],
)
async def test_what_surely_is_too_long_is_refused_before_it_is_tokenized(
    validation: Validation, params: P, error: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Tokenizer, "encode", None)
    with pytest.raises(InvalidRequest, match=re.escape(error)):
        await validation.validate("1" * 3000, params, add_special_tokens=True)


async def test_a_text_that_is_cut_by_truncate_has_a_limit_too(validation: Validation) -> None:
    error = re.escape("`inputs` must have at most 32768 tokens. Given: at least 40000")
    with pytest.raises(InvalidRequest, match=error):
        await validation.validate("1" * 40_000, P(truncate=5), add_special_tokens=True)
    valid = await validation.validate("1" * 30_000, P(truncate=5), add_special_tokens=True)
    assert len(valid.prompt_ids) == 5


def regex(size: int) -> Grammar:
    return Grammar(GrammarKind.REGEX, "a" * size)


async def test_a_small_grammar_does_not_wait_for_large_ones_and_callers_take_turns() -> None:
    compiled: list[int] = []
    first_began, go_on = asyncio.Event(), asyncio.Event()

    async def compiles(grammar: Grammar) -> None:
        if grammar.num_bytes == 50_000 and not first_began.is_set():
            first_began.set()
            await go_on.wait()
        compiled.append(grammar.num_bytes)

    with ThreadPoolExecutor(1) as threads:
        tokenizer = Tokenizer(byte_tokenizer_with_start(), EncodeQueue(threads, 1))
        validation = Validation(tokenizer, LIMITS, compiles)
        async with asyncio.TaskGroup() as tasks:
            for _ in range(50):
                tasks.create_task(validation.ready_grammar(regex(50_000), "one"))
            await first_began.wait()
            await validation.ready_grammar(regex(30), "two")
            assert compiled == [30]
            tasks.create_task(validation.ready_grammar(regex(40_000), "two"))
            await asyncio.sleep(0)
            go_on.set()
    assert compiled.index(40_000) <= 3
    assert len(compiled) == 52


async def test_a_grammar_that_is_too_large_is_refused_before_a_shard_sees_it() -> None:
    async def compiles(grammar: Grammar) -> None:
        raise AssertionError

    with ThreadPoolExecutor(1) as threads:
        tokenizer = Tokenizer(byte_tokenizer_with_start(), EncodeQueue(threads, 1))
        validation = Validation(tokenizer, LIMITS, compiles)
        with pytest.raises(InvalidRequest, match=f"65537 bytes, more than {MAX_GRAMMAR_BYTES}"):
            await validation.ready_grammar(regex(MAX_GRAMMAR_BYTES + 1))


@pytest.mark.parametrize("min_p", [-0.1, 1.5])
async def test_min_p_is_a_share(validation: Validation, min_p: float) -> None:
    error = re.escape(f"`min_p` must be >= 0.0 and <= 1.0. Given: {min_p}")
    with pytest.raises(InvalidRequest, match=error):
        await validation.validate("a", P(min_p=min_p), add_special_tokens=True)
