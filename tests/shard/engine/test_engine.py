"""The engine on a one-layer random model: what it computes must not depend on how it is asked."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tests.fakes.ranks import run_ranks
from tests.fakes.tiny_model import VOCAB, TinyModel, tiny_backend
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel
from tokenizers.models import BPE

from kagami_proto.errors import InvalidRequest
from kagami_proto.values import Grammar, GrammarKind, SamplingParams
from kagami_shard.backends.torch.runner import TorchBackend
from kagami_shard.engine.engine import NOT_FINITE, Engine
from kagami_shard.engine.step import NewSequence, Step, StepResult, Work
from kagami_shard.engine.warmup import WarmupLimits
from kagami_shard.machine.bandwidth import Probe
from kagami_shard.machine.distributed import Group, TensorParallel
from kagami_shard.sampling.grammar import Grammars

BLOCK = 4
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]
GREEDY = SamplingParams()


def new_engine(
    model: TinyModel | TorchBackend | None = None,
    parallel: TensorParallel | None = None,
    grammars: Grammars | None = None,
    probe: Probe | None = None,
) -> Engine:
    engine = Engine(
        model if isinstance(model, TorchBackend) else tiny_backend(model),
        block_size=BLOCK,
        parallel=parallel,
        grammars=grammars,
        probe=probe,
    )
    engine.warmup(WarmupLimits(128, 8, 100, 400))
    return engine


def new_sequence(
    sequence_id: int = 1,
    token_ids: list[int] | None = None,
    sampling: SamplingParams = GREEDY,
    **changes: object,
) -> NewSequence:
    ids = PROMPT if token_ids is None else token_ids
    return NewSequence(sequence_id, ids, len(ids), sampling, **changes)  # type: ignore[arg-type]


def run(engine: Engine, step: Step) -> StepResult:
    return engine.collect(engine.launch(step))


def generate(engine: Engine, new: NewSequence, blocks: list[int], count: int) -> list[int]:
    """Prefill in one step, then decode."""
    length = len(new.token_ids)
    first = Step(1, [new], (), [Work(new.id, 0, length)], {new.id: blocks})
    tokens = list(run(engine, first).token_ids)
    for number in range(1, count):
        step = Step(number + 1, work=[Work(new.id, length + number - 1, 1)])
        tokens += run(engine, step).token_ids
    return tokens


def test_chunks_give_what_one_prefill_gives() -> None:
    expected = generate(new_engine(), new_sequence(), [1, 2, 3, 4, 5], 6)
    engine = new_engine()

    run(engine, Step(1, [new_sequence()], (), [Work(1, 0, 3)], {1: [9]}))
    run(engine, Step(2, work=[Work(1, 3, 1)]))
    result = run(engine, Step(3, work=[Work(1, 4, 7)], grants={1: [7, 5]}))
    tokens = list(result.token_ids)
    for position in range(11, 16):
        grants = {1: [2]} if position == 12 else {}
        tokens += run(engine, Step(position, work=[Work(1, position, 1)], grants=grants)).token_ids

    assert tokens == expected


def test_an_unfinished_chunk_samples_nothing() -> None:
    result = run(new_engine(), Step(1, [new_sequence()], (), [Work(1, 0, 10)], {1: [1, 2, 3]}))

    assert (list(result.ids), dict(result.failures)) == ([], {})


def test_a_batch_gives_what_each_gives_alone() -> None:
    prompts = {1: PROMPT, 2: PROMPT[:4], 3: [7], 4: [n % 50 for n in range(60)]}
    blocks = {1: [1, 2, 3, 4], 2: [5, 6], 3: [7, 8], 4: list(range(10, 27))}
    expected = {
        i: generate(new_engine(), new_sequence(i, ids), blocks[i], 4) for i, ids in prompts.items()
    }
    engine = new_engine()

    step = Step(
        1,
        [new_sequence(i, ids) for i, ids in prompts.items()],
        (),
        [Work(i, 0, len(ids)) for i, ids in prompts.items()],
        blocks,
    )
    seen: dict[int, list[int]] = {i: [] for i in prompts}
    for number in range(4):
        result = run(engine, step)
        for sequence_id, token_id in zip(result.ids, result.token_ids, strict=True):
            seen[sequence_id].append(token_id)
        work = [Work(i, len(ids) + number, 1) for i, ids in prompts.items()]
        step = Step(number + 2, work=work)

    assert seen == expected


@pytest.mark.parametrize(
    "sampling",
    [
        GREEDY,
        SamplingParams(do_sample=True, seed=5, temperature=2.0),
        SamplingParams(do_sample=True, seed=5, repetition_penalty=1.4, frequency_penalty=0.5),
    ],
)
def test_overlapped_steps_give_the_same(sampling: SamplingParams) -> None:
    new = new_sequence(sampling=sampling)
    expected = generate(new_engine(), new, [1, 2, 3, 4, 5], 8)
    engine = new_engine()

    tokens: list[int] = []
    launched = engine.launch(Step(1, [new], (), [Work(1, 0, 11)], {1: [1, 2, 3, 4, 5]}))
    for position in range(11, 18):
        step = Step(position, work=[Work(1, position, 1)])
        if engine.reads_history(step):
            tokens += engine.collect(launched).token_ids
            launched = engine.launch(step)
        else:
            following = engine.launch(step)
            tokens += engine.collect(launched).token_ids
            launched = following
    tokens += engine.collect(launched).token_ids

    assert tokens == expected


def test_a_replay_goes_on_where_it_was() -> None:
    sampling = SamplingParams(do_sample=True, seed=9, temperature=3.0, presence_penalty=0.7)
    expected = generate(new_engine(), new_sequence(sampling=sampling), [1, 2, 3, 4, 5], 8)
    engine = new_engine()
    started = generate(engine, new_sequence(sampling=sampling), [1, 2, 3, 4, 5], 4)

    ids = PROMPT + started
    replay = NewSequence(1, ids, len(PROMPT), sampling)
    result = run(engine, Step(9, [replay], [1], [Work(1, 0, len(ids))], {1: [9, 8, 7, 6, 10]}))
    tokens = started + list(result.token_ids)
    for position in range(len(ids), len(ids) + 3):
        tokens += run(engine, Step(position, work=[Work(1, position, 1)])).token_ids

    assert tokens == expected


def test_prompt_logprobs_are_the_models_and_come_with_their_chunk() -> None:
    new = new_sequence(prompt_logprobs=True)
    engine = new_engine()
    whole = run(engine, Step(1, [new], (), [Work(1, 0, 11)], {1: [1, 2, 3]})).prompt_logprobs[0]
    engine = new_engine()

    first = run(engine, Step(1, [new], (), [Work(1, 0, 4)], {1: [1, 2, 3]})).prompt_logprobs[0]
    second = run(engine, Step(2, work=[Work(1, 4, 7)])).prompt_logprobs[0]

    assert (whole.first_position, first.first_position, second.first_position) == (1, 1, 5)
    assert len(whole.logprobs) == 10
    assert [*first.logprobs, *second.logprobs] == pytest.approx(list(whole.logprobs), abs=1e-5)


def test_prompt_top_tokens_come_where_top_tokens_are_asked_for() -> None:
    engine = new_engine()
    news = [
        new_sequence(1, prompt_logprobs=True),
        new_sequence(2, prompt_logprobs=True, top_n_tokens=3),
    ]
    work = [Work(1, 0, 11), Work(2, 0, 11)]

    plain, rich = run(engine, Step(1, news, (), work, {1: [1, 2, 3], 2: [4, 5, 6]})).prompt_logprobs

    assert plain.top_ids == ()
    assert [len(row) for row in rich.top_ids] == [3] * 10
    for position, (ids, logprobs) in enumerate(
        zip(rich.top_ids, rich.top_logprobs, strict=True), rich.first_position
    ):
        assert list(logprobs) == sorted(logprobs, reverse=True)
        if PROMPT[position] in ids:
            own = logprobs[list(ids).index(PROMPT[position])]
            assert own == rich.logprobs[position - rich.first_position]


def test_a_biased_id_beyond_the_vocabulary_fails_its_sequence_only() -> None:
    engine = new_engine()
    biased = SamplingParams(logit_bias=((VOCAB, 1.0),))
    news = [new_sequence(1, sampling=biased), new_sequence(2)]

    result = run(
        engine,
        Step(1, news, (), [Work(1, 0, 11), Work(2, 0, 11)], {1: [1, 2, 3], 2: [4, 5, 6]}),
    )

    assert result.failures == {
        1: f"the biased token id {VOCAB} is not below the vocabulary's {VOCAB}"
    }
    assert list(result.ids) == [2]


def test_top_tokens_belong_to_their_row() -> None:
    engine = new_engine()
    news = [new_sequence(1), new_sequence(2, top_n_tokens=3)]

    result = run(
        engine,
        Step(1, news, (), [Work(1, 0, 11), Work(2, 0, 11)], {1: [1, 2, 3], 2: [4, 5, 6]}),
    )

    assert [(top.row, len(top.token_ids)) for top in result.top_tokens] == [(1, 3)]
    assert result.top_tokens[0].token_ids[0] == result.token_ids[1]


def test_one_bad_sequence_fails_alone() -> None:
    engine = new_engine()
    bad = new_sequence(2, [1, VOCAB])
    refused = new_sequence(3, refused="no grammar here")

    result = run(
        engine,
        Step(
            1,
            [new_sequence(), bad, refused],
            (),
            [Work(1, 0, 11), Work(2, 0, 2), Work(3, 0, 11), Work(4, 0, 1)],
            {1: [1, 2, 3], 2: [4], 3: [5, 6, 7]},
        ),
    )

    assert list(result.ids) == [1]
    assert result.failures == {
        2: f"token id {VOCAB} is not below the vocabulary's {VOCAB}",
        3: "no grammar here",
        4: "the sequence is not in memory",
    }


def test_work_without_a_block_fails_its_sequence() -> None:
    result = run(new_engine(), Step(1, [new_sequence()], (), [Work(1, 0, 11)], {1: [1, 2]}))

    assert result.failures == {1: "position 11 has no block"}


def test_output_that_is_not_finite_fails_its_sequence_alone() -> None:
    model = TinyModel()
    model.nan_at = 60
    engine = new_engine(model)
    expected = generate(new_engine(), new_sequence(), [1, 2, 3, 4, 5], 3)

    news = [new_sequence(), new_sequence(2, [5, 60])]
    work = [Work(1, 0, 11), Work(2, 0, 2)]
    result = run(engine, Step(1, news, (), work, {1: [1, 2, 3, 4], 2: [5]}))
    again = run(engine, Step(2, work=[Work(1, 11, 1), Work(2, 2, 1)]))

    assert result.failures == again.failures == {2: "the model's output is not finite"}
    assert [*result.token_ids, *again.token_ids] == expected[:2]


def test_blocks_that_are_not_finite_are_cleaned_and_finite_shared_ones_are_kept() -> None:
    model = TinyModel()
    model.nan_at = 60
    engine = new_engine(model)
    assert engine.cache is not None
    values = engine.cache.values[0]
    run(engine, Step(1, [new_sequence()], (), [Work(1, 0, 11)], {1: [1, 2, 3, 4]}))
    shared = values[1].clone()
    values[5] = float("nan")

    second = NewSequence(2, [*PROMPT[:4], 7, 60], 6, GREEDY)
    third = NewSequence(3, [*PROMPT[:4], 9, 9], 6, GREEDY)
    work = [Work(2, 4, 2), Work(3, 4, 2)]
    run(engine, Step(2, [second, third], (), work, {2: [1, 6, 5], 3: [1, 7]}))
    result = run(engine, Step(3, work=[Work(1, 11, 1), Work(3, 6, 1)]))

    assert torch.equal(values[1], shared)
    assert not values[5].any()
    assert not result.failures


def test_a_forward_pass_that_raises_leaves_the_engine_usable() -> None:
    model = TinyModel()
    engine = new_engine(model)
    expected = generate(new_engine(), new_sequence(), [1, 2, 3, 4], 3)
    model.fail_at = 9

    with pytest.raises(RuntimeError, match="the kernel broke"):
        engine.launch(Step(1, [new_sequence()], (), [Work(1, 0, 11)], {1: [1, 2, 3, 4]}))
    model.fail_at = None

    replay = Step(2, [new_sequence()], [1], [Work(1, 0, 11)], {1: [1, 2, 3, 4]})
    assert list(run(engine, replay).token_ids) == expected[:1]


def test_an_empty_step_is_answered() -> None:
    result = run(new_engine(), Step(7, drop_ids=[1, 2]))

    assert (result.number, list(result.ids), result.error) == (7, [], "")


def test_warmup_sizes_the_pool_once() -> None:
    engine = new_engine()
    assert engine.cache is not None

    again = engine.warmup(WarmupLimits(8, 1, 10, 10))

    assert again is engine.cache
    assert again.num_blocks == 1 + 400 // BLOCK


def test_a_probe_is_asked_once_and_told_with_what_a_step_reads() -> None:
    asked: list[torch.device] = []

    def probe(device: torch.device) -> float:
        asked.append(device)
        return 1e9

    engine = new_engine(probe=probe)
    engine.warmup(WarmupLimits(8, 1, 10, 10))

    assert asked == [torch.device("cpu")]
    assert engine.read_cost.bandwidth == 1e9
    assert engine.read_cost.weight_bytes > 0


def test_a_step_tells_its_parts_of_the_time() -> None:
    result = run(new_engine(), Step(1, [new_sequence()], (), [Work(1, 0, 11)], {1: [1, 2, 3, 4]}))

    assert 0 < result.sampling_ns < result.device_ns <= result.host_ns
    assert 0 < result.admission_ns < result.host_ns


def test_ranks_draw_what_rank_0_draws() -> None:
    def draws(group: Group) -> list[int]:
        model = TinyModel()
        if group.rank:
            model.head = model.head.flip(0)  # far more than a GPU's rounding
        new = new_sequence(sampling=SamplingParams(do_sample=True, seed=7))
        return generate(new_engine(model, group), new, [1, 2, 3, 4, 5], 6)

    new = new_sequence(sampling=SamplingParams(do_sample=True, seed=7))
    alone = generate(new_engine(), new, [1, 2, 3, 4, 5], 6)
    assert run_ranks(2, draws) == [alone, alone]


def test_a_block_that_is_not_finite_on_one_rank_is_bad_on_all() -> None:
    def failures(group: Group) -> list[dict[int, str]]:
        model = TinyModel()
        model.nan_at = 7
        engine = new_engine(model, group)
        new = [new_sequence(1, [3, 1, 7]), new_sequence(2, [3, 1, 4])]
        launched = engine.launch(
            Step(1, new, (), [Work(1, 0, 3), Work(2, 0, 3)], {1: [1], 2: [1, 2]})
        )
        assert engine.cache is not None
        if group.rank == 1:
            engine.cache.keys[0][1, 0] = float("nan")
        first = engine.collect(launched)
        second = run(engine, Step(2, work=[Work(2, 3, 1)]))
        return [dict(first.failures), dict(second.failures)]

    assert run_ranks(2, failures) == [[{1: NOT_FINITE}, {2: NOT_FINITE}]] * 2


# ---------------------------------------------------------------------- grammars


def letters(folder: Path) -> Grammars:
    """A vocabulary of the tiny model's size whose ids 10, 11, … stand for a, b, …; 0 ends."""
    vocabulary = {f"<{n}>": n for n in range(VOCAB)}
    for offset in range(26):
        del vocabulary[f"<{10 + offset}>"]
        vocabulary[chr(97 + offset)] = 10 + offset
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    tokenizer.add_special_tokens([f"<{n}>" for n in (*range(10), *range(36, VOCAB))])
    tokenizer.decoder = ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    return Grammars(folder, vocab_size=VOCAB, eos_token_ids=[0])


@pytest.fixture
def grammars(tmp_path: Path) -> Iterator[Grammars]:
    made = letters(tmp_path)
    yield made
    made.close()


ABC = Grammar(GrammarKind.REGEX, "abc|abd")
A, B, C, D = 10, 11, 12, 13


def test_a_grammar_constrains_its_sequence_and_no_other(grammars: Grammars) -> None:
    free = generate(new_engine(), new_sequence(2), [4, 5, 6, 7], 4)
    engine = new_engine(grammars=grammars)
    news = [new_sequence(1, grammar=ABC), new_sequence(2)]
    step = Step(1, news, (), [Work(1, 0, 11), Work(2, 0, 11)], {1: [1, 2, 3, 8], 2: [4, 5, 6, 7]})
    seen: dict[int, list[int]] = {1: [], 2: []}
    for number in range(4):
        result = run(engine, step)
        for sequence_id, token_id in zip(result.ids, result.token_ids, strict=True):
            seen[sequence_id].append(token_id)
        step = Step(number + 2, work=[Work(1, 11 + number, 1), Work(2, 11 + number, 1)])

    assert seen[1] in ([A, B, C, 0], [A, B, D, 0])
    assert seen[2] == free


def test_a_replayed_sequence_goes_on_in_its_grammar(grammars: Grammars) -> None:
    engine = new_engine(grammars=grammars)
    replay = NewSequence(1, [*PROMPT, A, B], len(PROMPT), GREEDY, grammar=ABC)

    result = run(engine, Step(1, [replay], (), [Work(1, 0, 13)], {1: [1, 2, 3, 4]}))

    assert result.token_ids[0] in (C, D)


def test_a_sampled_sequence_obeys_its_grammar_at_any_temperature(grammars: Grammars) -> None:
    for seed in range(5):
        hot = SamplingParams(do_sample=True, seed=seed, temperature=50.0, top_k=3, top_p=0.9)
        new = new_sequence(1, sampling=hot, grammar=ABC)
        tokens = generate(new_engine(grammars=grammars), new, [1, 2, 3, 4], 4)
        assert tokens in ([A, B, C, 0], [A, B, D, 0])


def test_a_grammar_that_cannot_be_compiled_fails_its_sequence_only(grammars: Grammars) -> None:
    engine = new_engine(grammars=grammars)
    bad = new_sequence(1, grammar=Grammar(GrammarKind.REGEX, "("))

    result = run(
        engine,
        Step(
            1,
            [bad, new_sequence(2)],
            (),
            [Work(1, 0, 11), Work(2, 0, 11)],
            {1: [1, 2, 3], 2: [4, 5, 6]},
        ),
    )

    assert list(result.ids) == [2]
    assert "grammar is not valid" in result.failures[1]


def test_a_sequence_that_left_its_grammar_fails_alone(grammars: Grammars) -> None:
    engine = new_engine(grammars=grammars)
    astray = NewSequence(1, [*PROMPT, D], len(PROMPT), GREEDY, grammar=ABC)

    result = run(
        engine,
        Step(
            1,
            [astray, new_sequence(2)],
            (),
            [Work(1, 0, 12), Work(2, 0, 11)],
            {1: [1, 2, 3], 2: [4, 5, 6]},
        ),
    )

    assert list(result.ids) == [2]
    assert "the grammar stopped the sequence" in result.failures[1]


def test_an_engine_without_a_vocabulary_refuses_grammars() -> None:
    with pytest.raises(InvalidRequest):
        new_engine().compile_grammar(ABC)


def test_grammar_and_watermark_read_the_token_before(grammars: Grammars) -> None:
    for changes in ({"grammar": ABC}, {"sampling": SamplingParams(watermark=True)}):
        engine = new_engine(grammars=grammars)
        launched = engine.launch(
            Step(1, [new_sequence(1, **changes)], (), [Work(1, 0, 11)], {1: [1, 2, 3]})
        )
        assert engine.reads_history(Step(2, work=[Work(1, 11, 1)]))
        engine.collect(launched)
