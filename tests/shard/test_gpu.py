"""The engine on a CUDA device against the same engine on the CPU; `make gpu-check` runs these."""

from pathlib import Path

import pytest
import torch
from tests.fakes.tiny_model import TinyModel, tiny_backend
from tests.shard.engine.test_engine import ABC, A, B, C, D, letters

from kagami_proto.values import SamplingParams
from kagami_shard.engine.engine import Engine
from kagami_shard.engine.step import NewSequence, Step, Work
from kagami_shard.engine.warmup import WarmupLimits
from kagami_shard.sampling.grammar import Grammars

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]

PROMPTS = {1: [3, 1, 4, 1, 5, 9, 2, 6], 2: [7, 7], 3: list(range(40))}
BLOCKS = {1: [1, 2, 3, 4], 2: [5, 6, 7], 3: list(range(10, 25))}


def new_engine(device: str, grammars: Grammars | None = None) -> Engine:
    model = TinyModel()
    for name in ("embedding", "position", "qkv", "head"):
        setattr(model, name, getattr(model, name).to(device))
    engine = Engine(tiny_backend(model, torch.device(device)), block_size=4, grammars=grammars)
    engine.warmup(WarmupLimits(64, 8, 100, 400))
    return engine


def generate(device: str, sampling: SamplingParams, *, overlap: bool) -> dict[int, list[int]]:
    news = [NewSequence(i, ids, len(ids), sampling) for i, ids in PROMPTS.items()]
    return run(new_engine(device), news, overlap=overlap)


def run(engine: Engine, news: list[NewSequence], *, overlap: bool) -> dict[int, list[int]]:
    """Seven tokens of each of the prompts."""
    work = [Work(i, 0, len(ids)) for i, ids in PROMPTS.items()]
    steps = [Step(1, news, (), work, BLOCKS)]
    steps += [
        Step(n + 2, work=[Work(i, len(ids) + n, 1) for i, ids in PROMPTS.items()]) for n in range(6)
    ]
    seen: dict[int, list[int]] = {i: [] for i in PROMPTS}
    launched = []
    for step in steps:
        if launched and (not overlap or engine.reads_history(step)):
            collect(engine, launched.pop(), seen)
        launched.append(engine.launch(step))
        if len(launched) == 2:
            collect(engine, launched.pop(0), seen)
    for each in launched:
        collect(engine, each, seen)
    return seen


def collect(engine: Engine, launched: object, seen: dict[int, list[int]]) -> None:
    result = engine.collect(launched)  # type: ignore[arg-type]  # what launch returned
    assert not result.failures
    for sequence_id, token_id in zip(result.ids, result.token_ids, strict=True):
        seen[sequence_id].append(token_id)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(),
        SamplingParams(do_sample=True, seed=3, temperature=1.5, top_p=0.9, top_k=20),
        SamplingParams(do_sample=True, seed=3, typical_p=0.8, repetition_penalty=1.3),
    ],
)
def test_cuda_gives_what_the_cpu_gives(sampling: SamplingParams, overlap: bool) -> None:
    expected = generate("cpu", sampling, overlap=False)

    assert generate("cuda", sampling, overlap=overlap) == expected


# torch says each time that the mode is a prototype.
@pytest.mark.filterwarnings("ignore:Synchronization debug mode:UserWarning")
def test_a_launch_does_not_wait_for_the_device() -> None:
    engine = new_engine("cuda")
    sampling = SamplingParams(do_sample=True, seed=3, top_p=0.9)
    news = [NewSequence(i, ids, len(ids), sampling) for i, ids in PROMPTS.items()]
    first = Step(1, news, (), [Work(i, 0, len(ids)) for i, ids in PROMPTS.items()], BLOCKS)
    second = Step(2, work=[Work(i, len(ids), 1) for i, ids in PROMPTS.items()])
    engine.launch(first)
    torch.cuda.synchronize()

    try:
        torch.cuda.set_sync_debug_mode("error")
        engine.launch(second)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("overlap", [False, True])
def test_a_grammar_holds_on_cuda(overlap: bool, tmp_path: Path) -> None:
    hot = SamplingParams(do_sample=True, seed=5, temperature=50.0)
    grammars = letters(tmp_path)
    news = [
        NewSequence(i, ids, len(ids), hot, grammar=ABC if i == 2 else None)
        for i, ids in PROMPTS.items()
    ]
    try:
        seen = run(new_engine("cuda", grammars), news, overlap=overlap)
    finally:
        grammars.close()

    assert seen[2][:4] in ([A, B, C, 0], [A, B, D, 0])
    assert seen[1] == generate("cpu", hot, overlap=False)[1]
