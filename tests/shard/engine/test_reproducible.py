"""A greedy sequence has the same ids and the same logprobs, bit for bit, whoever else is there."""

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import pytest
import torch
from tests.fakes.native import needs_library
from tests.shard.engine.test_engine import ABC, GREEDY, letters, run
from transformers import LlamaConfig

from kagami_proto.values import SamplingParams
from kagami_shard import cli
from kagami_shard.backends.native.build import build
from kagami_shard.backends.native.select import Native
from kagami_shard.backends.torch.load import load_torch
from kagami_shard.engine.engine import Engine
from kagami_shard.engine.step import NewSequence, Step, Work
from kagami_shard.engine.warmup import WarmupLimits
from kagami_shard.forward.kv_cache import blocks_for

CPU = torch.device("cpu")
BLOCK = 32
VOCAB = 64
PROMPT = [7 * i % 60 for i in range(230)]
NUM_TOKENS = 40
CONFIG = LlamaConfig(
    vocab_size=VOCAB,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=1024,
)
SAMPLED = SamplingParams(do_sample=True, seed=3, temperature=1.5)


@pytest.fixture(scope="module", params=[(None, 1), (None, 3), ("int8", 2)], ids=str)
def engine(
    request: pytest.FixtureRequest,
    save_checkpoint: Callable[..., tuple],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Engine]:
    needs_library()
    quantize, num_threads = request.param
    folder, _ = save_checkpoint(CONFIG)
    grammars = letters(tmp_path_factory.mktemp("letters"))
    cache = cli.cache_folder(os.environ)
    backend = load_torch(
        folder,
        dtype=torch.bfloat16,
        device=CPU,
        quantize=quantize,
        successor=Native(cache, num_threads).take_over,
    )
    engine = Engine(backend, block_size=BLOCK, grammars=grammars)
    engine.warmup(WarmupLimits(512, 16, 1024, 200 * BLOCK))
    build(cache)
    engine.upgrade()
    assert engine.backend.name == "native"
    yield engine
    grammars.close()


Tokens = list[tuple[int, float]]


@dataclass(slots=True, eq=False)
class Running:
    """A sequence in the engine, with blocks of its own for all that it will be."""

    id: int
    ids: list[int]
    computed: int = 0
    chunk: int = 512
    changes: dict[str, object] = field(default_factory=dict)
    sampling: SamplingParams = GREEDY
    num_prompt_tokens: int = 0
    blocks: Sequence[int] = ()
    told: Tokens = field(default_factory=list)

    def __post_init__(self) -> None:
        self.num_prompt_tokens = self.num_prompt_tokens or len(self.ids)
        first = 12 * self.id
        self.blocks = self.blocks or range(first, first + 12)
        assert blocks_for(len(self.ids) + NUM_TOKENS, BLOCK) <= len(self.blocks)

    def new(self) -> NewSequence:
        return NewSequence(
            self.id,
            list(self.ids),
            self.num_prompt_tokens,
            self.sampling,
            **self.changes,  # type: ignore[arg-type]  # by name
        )


def go(
    engine: Engine, sequences: Sequence[Running], num_steps: int, *, is_new: bool = True
) -> None:
    """So many steps of all of them."""
    for number in range(num_steps):
        is_first = is_new and number == 0
        work = [
            Work(one.id, one.computed, min(one.chunk, len(one.ids) - one.computed))
            for one in sequences
        ]
        step = Step(
            number,
            [one.new() for one in sequences] if is_first else (),
            (),
            work,
            {one.id: list(one.blocks) for one in sequences} if is_first else {},
        )
        result = run(engine, step)
        assert not result.failures
        rows = {
            row[0]: row[1:]
            for row in zip(result.ids, result.token_ids, result.logprobs, strict=True)
        }
        for one, (_, _, count, _) in zip(sequences, work, strict=True):
            one.computed += count
            if one.id in rows:
                one.told.append(rows[one.id])
                one.ids.append(rows[one.id][0])


def ours(**changes: object) -> Running:
    return Running(1, list(PROMPT), **changes)  # type: ignore[arg-type]  # by name


def alone(engine: Engine) -> Tokens:
    engine.reset()
    sequence = ours()
    go(engine, [sequence], NUM_TOKENS)
    assert len(sequence.told) == NUM_TOKENS
    return sequence.told


def others(**changes: object) -> list[Running]:
    """Of several lengths; the last one's prompt is in chunks beside the others' decodes."""
    lengths = {2: 5, 3: 90, 4: 33, 5: 1}
    return [
        Running(one, [(3 * i + one) % 60 for i in range(length)], **changes)  # type: ignore[arg-type]
        for one, length in lengths.items()
    ]


COMPANY: dict[str, Callable[[], list[Running]]] = {
    "greedy": others,
    "sampled": lambda: others(sampling=SAMPLED),
    "penalized": lambda: others(sampling=SamplingParams(repetition_penalty=1.3)),
    "top tokens": lambda: others(changes={"top_n_tokens": 5}),
    "prompt logprobs": lambda: others(changes={"prompt_logprobs": True}),
    "grammar": lambda: others(changes={"grammar": ABC})[:1],
    "the same prompt": lambda: [Running(one, list(PROMPT)) for one in (2, 3, 4)],
    "a prompt in chunks": lambda: [Running(2, [5 * i % 60 for i in range(340)], chunk=20)],
    "as many as nobody's cache is cut for": lambda: [
        Running(one, [one] * 140) for one in range(2, 15)
    ],
    "a prompt in long chunks": lambda: [Running(2, [5 * i % 60 for i in range(340)], chunk=300)],
}


@pytest.mark.parametrize("company", COMPANY)
def test_a_greedy_sequence_has_the_same_bits_alone_and_among_others(
    company: str, engine: Engine
) -> None:
    expected = alone(engine)
    engine.reset()
    sequence, mates = ours(), COMPANY[company]()
    num_steps = 4 if company == "grammar" else NUM_TOKENS
    go(engine, [sequence, *mates], num_steps)
    assert sequence.told == expected[:num_steps]


@pytest.mark.parametrize(
    "changes", [{"top_n_tokens": 5}, {"prompt_logprobs": True}], ids=["top tokens", "prompt"]
)
def test_what_is_asked_for_beside_the_tokens_changes_no_bit(
    changes: dict[str, object], engine: Engine
) -> None:
    expected = alone(engine)
    engine.reset()
    sequence = ours(changes=changes)
    go(engine, [sequence], NUM_TOKENS)
    assert sequence.told == expected


@pytest.mark.parametrize("chunk", [16, 33, 64, 130])
def test_chunks_of_the_prompt_change_no_bit(chunk: int, engine: Engine) -> None:
    expected = alone(engine)
    engine.reset()
    sequence = ours(chunk=chunk)
    go(engine, [sequence], NUM_TOKENS + (len(PROMPT) - 1) // chunk)
    assert sequence.told == expected


@pytest.mark.parametrize("num_blocks", [2, 4, 5, 7])
def test_a_prefix_hit_changes_no_bit_nor_do_others_that_share_it(
    num_blocks: int, engine: Engine
) -> None:
    expected = alone(engine)
    engine.reset()
    shared = num_blocks * BLOCK
    before = Running(2, [*PROMPT[:shared], 1, 2, 3])
    go(engine, [before], 1)
    blocks = [*before.blocks[:num_blocks], *range(1, 13 - num_blocks)]
    sequence = ours(computed=shared, blocks=blocks)
    mates = [
        Running(
            one,
            [*PROMPT[:shared], *range(one)],
            computed=shared,
            blocks=[*before.blocks[:num_blocks], *range(12 * one, 12 * one + 5)],
        )
        for one in (3, 4, 5)
    ]
    for mates_now in (mates, []):
        go(engine, [sequence, *mates_now], NUM_TOKENS)
        assert sequence.told == expected
        engine.reset()
        sequence = ours(computed=shared, blocks=blocks)


@pytest.mark.parametrize("mates", [0, 1])
def test_a_preemption_changes_no_bit(mates: int, engine: Engine) -> None:
    expected = alone(engine)
    engine.reset()
    for split in (1, 7, 20):
        first = ours()
        go(engine, [first], split)
        again = ours(num_prompt_tokens=len(PROMPT))
        again.ids = list(first.ids)
        engine.reset()
        go(engine, [again, *others(sampling=SAMPLED)[:mates]], NUM_TOKENS - split)
        assert first.told + again.told == expected


def test_a_top_token_that_is_the_chosen_one_has_its_bits(engine: Engine) -> None:
    engine.reset()
    new = ours(changes={"top_n_tokens": 3}).new()
    step = Step(1, [new], (), [Work(1, 0, len(PROMPT))], {1: list(range(1, 9))})
    result = run(engine, step)
    (top,) = result.top_tokens
    assert (top.token_ids[0], top.logprobs[0]) == (result.token_ids[0], result.logprobs[0])
