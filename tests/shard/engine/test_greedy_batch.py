"""An engine whose greedy decodes feed themselves answers as one that builds every step."""

from collections.abc import Sequence

import pytest
import torch
from tests.fakes.tiny_model import CPU, TinyModel
from tests.shard.engine.test_engine import BLOCK, GREEDY, PROMPT, new_engine, new_sequence, run

from kagami_proto.values import SamplingParams
from kagami_shard.backends.torch.runner import TorchBackend
from kagami_shard.engine.engine import NOT_FINITE, Engine
from kagami_shard.engine.step import Step, StepResult, WorkColumns
from kagami_shard.forward.batch import ForwardBatch, Queries
from kagami_shard.forward.kv_cache import KVCache
from kagami_shard.forward.output import OutputKind


class TorchDecodes:
    """`Decodes` that run the torch backend step by step."""

    sampling_ns = 1
    table_width = 6

    def __init__(
        self,
        backend: "SelfFeedingBackend",
        cache: KVCache,
        ids: Sequence[int],
        positions: Sequence[int],
        tables: Sequence[Sequence[int]],
    ) -> None:
        self._backend = backend
        self._cache = cache
        self._ids = torch.tensor(ids)
        self._positions = torch.tensor(positions)
        self._tables = torch.zeros(len(ids), self.table_width, dtype=torch.int64)
        self._logprobs = torch.zeros(len(ids))
        for row, blocks in enumerate(tables):
            self.grant(row, 0, blocks)

    @torch.inference_mode()
    def grant(self, row: int, first: int, blocks: Sequence[int]) -> None:
        self._tables[row, first : first + len(blocks)] = torch.tensor(blocks)

    @torch.inference_mode()
    def run(self) -> int:
        self._backend.num_own_steps += 1
        size, rows = self._cache.block_size, torch.arange(len(self._ids))
        blocks = self._tables[rows, self._positions // size]
        queries = Queries(
            block_tables=self._tables,
            query_lens=(1,) * len(rows),
            kv_lens=tuple((self._positions + 1).tolist()),
            num_decodes=len(rows),
        )
        batch = ForwardBatch(
            input_ids=self._ids,
            positions=self._positions,
            slots=blocks * size + self._positions % size,
            queries=queries,
            selected_rows=rows,
            selected=queries,
        )
        logits = self._backend.run(batch, self._cache, OutputKind.LOGITS).logits
        assert logits is not None
        self._ids = logits.argmax(-1)
        self._logprobs = logits.log_softmax(-1)[rows, self._ids]
        self._positions = self._positions + 1
        return int((~self._logprobs.isfinite()).sum())

    def chosen(self) -> tuple[list[int], list[float]]:
        return self._ids.tolist(), self._logprobs.tolist()


class SelfFeedingBackend(TorchBackend):
    """A backend that carries greedy decodes on."""

    def __init__(self) -> None:
        self.tiny = TinyModel()
        super().__init__(self.tiny, self.tiny.forward, dtype=torch.float32, device=CPU)
        self.num_batches = 0
        self.num_own_steps = 0

    def carry_on(  # type: ignore[override]  # the torch backend says that it never does
        self,
        cache: KVCache,
        last_ids: Sequence[int],
        positions: Sequence[int],
        tables: Sequence[Sequence[int]],
    ) -> TorchDecodes:
        self.num_batches += 1
        return TorchDecodes(self, cache, last_ids, positions, tables)


def decode(
    number: int,
    positions: dict[int, int],
    grants: dict[int, list[int]] | None = None,
    **more: object,
) -> Step:
    work = WorkColumns(list(positions), list(positions.values()), [1] * len(positions))
    return Step(number, work=work, grants=grants or {}, **more)  # type: ignore[arg-type]  # by name


def prefill(
    engine: Engine, prompts: dict[int, list[int]], sampling: SamplingParams = GREEDY
) -> StepResult:
    """Each with the blocks from 20 times its id on that its prompt needs."""
    news = [new_sequence(one, ids, sampling) for one, ids in prompts.items()]
    grants = {
        one: list(range(20 * one, 20 * one + -(-len(ids) // BLOCK))) for one, ids in prompts.items()
    }
    counts = [len(ids) for ids in prompts.values()]
    work = WorkColumns(list(prompts), [0] * len(prompts), counts)
    return run(engine, Step(1, news, (), work, grants))


def told(results: Sequence[StepResult]) -> list[object]:
    """What does not depend on the clock."""
    return [
        (
            dict(zip(one.ids, one.token_ids, strict=True)),
            dict(zip(one.ids, one.logprobs, strict=True)),
            dict(one.failures),
        )
        for one in results
    ]


PROMPTS = {1: PROMPT, 2: PROMPT[:4], 3: [7]}


def answers(engine: Engine, sampling: SamplingParams = GREEDY) -> list[StepResult]:
    """12 steps of three sequences; blocks come when they are needed, one sequence ends."""
    results = [prefill(engine, PROMPTS, sampling)]
    positions = {one: len(ids) for one, ids in PROMPTS.items()}
    for number in range(2, 14):
        if number == 8:
            del positions[2]
        grants = {
            one: [20 * one + position // BLOCK]
            for one, position in positions.items()
            if position % BLOCK == 0 and position // BLOCK >= -(-len(PROMPTS[one]) // BLOCK)
        }
        drops = (2,) if number == 8 else ()
        results.append(run(engine, decode(number, positions, grants, drop_ids=drops)))
        positions = {one: position + 1 for one, position in positions.items()}
    return results


def test_greedy_decodes_answer_as_steps_built_one_by_one() -> None:
    backend = SelfFeedingBackend()
    expected = told(answers(new_engine()))
    seen = told(answers(new_engine(backend)))
    assert [one[0] for one in seen] == [one[0] for one in expected]  # type: ignore[index]  # pairs
    for ours, theirs in zip(seen, expected, strict=True):
        assert ours[1] == pytest.approx(theirs[1], abs=1e-5)  # type: ignore[index]


def test_a_batch_is_built_when_it_changes_and_not_else() -> None:
    backend = SelfFeedingBackend()
    answers(new_engine(backend))
    assert (backend.num_batches, backend.num_own_steps) == (2, 12)


@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(do_sample=True, seed=1),
        SamplingParams(repetition_penalty=1.3),
        SamplingParams(logit_bias=((3, 1.0),)),
        SamplingParams(watermark=True),
    ],
)
def test_whoever_wants_more_than_the_most_likely_token_is_sampled_for(
    sampling: SamplingParams,
) -> None:
    backend = SelfFeedingBackend()
    answers(new_engine(backend), sampling)
    assert backend.num_own_steps == 0


def test_a_batch_that_stops_going_on_has_left_its_tokens_with_the_sequences() -> None:
    engine, other = new_engine(SelfFeedingBackend()), new_engine()
    for one in (engine, other):
        prefill(one, {1: PROMPT, 2: PROMPT[:4]})
        run(one, decode(2, {1: 11, 2: 4}, {2: [41]}))
        run(one, decode(3, {1: 12, 2: 5}, {1: [23]}))
    # Sequence 2 is computed again from an earlier position, beside a decode.
    work = WorkColumns([1, 2], [13, 3], [1, 4])
    ours, theirs = (run(one, Step(4, work=work)) for one in (engine, other))
    assert dict(zip(ours.ids, ours.token_ids, strict=True)) == dict(
        zip(theirs.ids, theirs.token_ids, strict=True)
    )
    assert len(ours.ids) == 2


def test_a_decode_without_a_block_fails_its_sequence_also_in_a_batch_that_goes_on() -> None:
    engine = new_engine(SelfFeedingBackend())
    prefill(engine, {1: PROMPT, 3: [7]})
    run(engine, decode(2, {1: 11, 3: 1}))
    result = run(engine, decode(3, {1: 12, 3: 2}))
    assert dict(result.failures) == {1: "position 13 has no block"}
    assert result.ids == [3]


def test_a_row_that_is_not_finite_fails_alone_and_the_batch_is_built_again() -> None:
    backend = SelfFeedingBackend()
    engine = new_engine(backend)
    prefill(engine, {1: PROMPT, 2: [1, 2]})
    before = run(engine, decode(2, {1: 11, 2: 2}))
    backend.tiny.nan_at = dict(zip(before.ids, before.token_ids, strict=True))[2]
    result = run(engine, decode(3, {1: 12, 2: 3}, {1: [23]}))
    after = run(engine, decode(4, {1: 13}))
    assert (result.ids, dict(result.failures)) == ([1], {2: NOT_FINITE})
    assert after.ids == [1]


def test_a_forward_pass_that_raises_ends_the_batch_and_no_sequence() -> None:
    backend = SelfFeedingBackend()
    engine = new_engine(backend)
    prefill(engine, {1: PROMPT})
    first = run(engine, decode(2, {1: 11}))
    backend.tiny.fail_at = first.token_ids[0]
    with pytest.raises(RuntimeError, match="the kernel broke"):
        run(engine, decode(3, {1: 12}, {1: [23]}))
    backend.tiny.fail_at = None
    again = run(engine, decode(4, {1: 12}))
    assert again.ids == [1]


def test_a_reset_forgets_the_batch() -> None:
    engine = new_engine(SelfFeedingBackend())
    prefill(engine, {1: PROMPT})
    run(engine, decode(2, {1: 11}))
    engine.reset()
    result = run(engine, decode(3, {1: 12}))
    assert dict(result.failures) == {1: "the sequence is not in memory"}
