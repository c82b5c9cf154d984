"""Our logits beside transformers' own, over steps that mix chunks and decodes."""

from pathlib import Path

import torch
from tests.fakes.batches import CPU, Runner
from torch import Tensor
from transformers import PreTrainedModel

from kagami_shard.backends.torch.load import load_torch
from kagami_shard.machine.distributed import TensorParallel

NUM_TOKENS = (23, 9, 17)


def prompts(vocab_size: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, vocab_size, (n,), generator=generator).tolist() for n in NUM_TOKENS]


@torch.inference_mode()
def expected_logits(model: PreTrainedModel, tokens: list[int]) -> Tensor:
    """`[num_tokens, vocab_size]`, one sequence at a time without a cache."""
    return model(torch.tensor([tokens]), use_cache=False).logits[0].float()


def runner_of(
    folder: Path,
    dtype: torch.dtype = torch.float32,
    parallel: TensorParallel | None = None,
    quantize: str | None = None,
    device: torch.device = CPU,
) -> Runner:
    return Runner(
        load_torch(folder, dtype=dtype, device=device, parallel=parallel, quantize=quantize)
    )


def our_logits(
    folder: Path,
    tokens: list[list[int]],
    dtype: torch.dtype = torch.float32,
    parallel: TensorParallel | None = None,
    quantize: str | None = None,
    device: torch.device = CPU,
) -> list[Tensor]:
    """Three sequences, run in chunks, in decodes and in both at once."""
    return run_in_steps(runner_of(folder, dtype, parallel, quantize, device), tokens)


# For each step: which sequence computes how many tokens.
STEPS = (
    ((0, 7),),
    ((0, 1), (1, 5), (2, 2)),
    ((1, 1), (0, 9)),
    ((2, 1), (1, 1), (0, 3)),
    ((1, 1), (0, 1), (2, 11)),
    ((1, 1), (2, 1), (0, 1)),
    ((0, 1), (2, 2)),
)


def run_in_steps(runner: Runner, tokens: list[list[int]]) -> list[Tensor]:
    """The logits after every token of three sequences."""
    sequences = [runner.add(each) for each in tokens]
    seen: list[list[Tensor]] = [[] for _ in sequences]
    for step in STEPS:
        rows = runner.step(*((sequences[i], count) for i, count in step))
        for (i, _), logits in zip(step, rows, strict=True):
            seen[i].append(logits.clone())  # a tape's are valid until the next step
    return [torch.cat(logits).cpu() for logits in seen]


def run_in_lean_steps(runner: Runner, tokens: list[list[int]]) -> list[dict[int, Tensor]]:
    """The same steps with fewer logits: none in the first, then after each last token alone.

    Returns for each sequence its logits by position.
    """
    sequences = [runner.add(each) for each in tokens]
    first, *others = ([(sequences[i], count) for i, count in step] for step in STEPS)
    runner.step_without_logits(*first)
    seen: list[dict[int, Tensor]] = [{} for _ in sequences]
    for work in others:
        rows = runner.step_for_last(*work).clone().cpu()
        for (sequence, _), logits in zip(work, rows, strict=True):
            seen[sequences.index(sequence)][sequence.computed - 1] = logits
    return seen


def ours_and_theirs(
    runner: Runner, model: PreTrainedModel, tokens: list[list[int]]
) -> tuple[Tensor, Tensor]:
    """`[num_rows, vocab_size]`: after every token, and again after those of lean steps."""
    expected = [expected_logits(model, each) for each in tokens]
    ours, theirs = run_in_steps(runner, tokens), list(expected)
    for seen, each in zip(run_in_lean_steps(runner, tokens), expected, strict=True):
        ours += [logits[None] for logits in seen.values()]
        theirs += [each[list(seen)]]
    return torch.cat(ours), torch.cat(theirs)


def worst_difference(folder: Path, model: PreTrainedModel, device: torch.device = CPU) -> float:
    """The largest difference between any two logits."""
    tokens = prompts(model.config.get_text_config().vocab_size)
    ours, theirs = ours_and_theirs(runner_of(folder, device=device), model, tokens)
    return float((ours - theirs).abs().max())


def relative_error_in_bfloat16(folder: Path, model: PreTrainedModel) -> float:
    """The error of all logits together, against transformers in float32."""
    tokens = prompts(model.config.get_text_config().vocab_size)
    return relative_error(runner_of(folder, torch.bfloat16), model, tokens)


def relative_error(runner: Runner, model: PreTrainedModel, tokens: list[list[int]]) -> float:
    ours, theirs = ours_and_theirs(runner, model, tokens)
    return float((ours - theirs).norm() / theirs.norm())
