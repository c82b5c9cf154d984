"""Our logits beside transformers' own, over steps that mix chunks and decodes."""

from pathlib import Path

import torch
from tests.fakes.batches import CPU, Runner
from torch import Tensor
from transformers import PreTrainedModel

from kagami_shard.distributed import TensorParallel
from kagami_shard.models.registry import load_model

NUM_TOKENS = (23, 9, 17)


def prompts(vocab_size: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, vocab_size, (n,), generator=generator).tolist() for n in NUM_TOKENS]


@torch.inference_mode()
def expected_logits(model: PreTrainedModel, tokens: list[int]) -> Tensor:
    """`[num_tokens, vocab_size]`, one sequence at a time without a cache."""
    return model(torch.tensor([tokens]), use_cache=False).logits[0].float()


def our_logits(
    folder: Path,
    tokens: list[list[int]],
    dtype: torch.dtype = torch.float32,
    parallel: TensorParallel | None = None,
    quantize: str | None = None,
    device: torch.device = CPU,
) -> list[Tensor]:
    """Three sequences, run in chunks, in decodes and in both at once."""
    model = load_model(folder, dtype=dtype, device=device, parallel=parallel, quantize=quantize)
    logits = run_in_steps(Runner(model, dtype=dtype, device=device), tokens)
    return [each.cpu() for each in logits]


def run_in_steps(runner: Runner, tokens: list[list[int]]) -> list[Tensor]:
    """The logits after every token of three sequences."""
    a, b, c = (runner.add(each) for each in tokens)
    seen: dict[int, list[Tensor]] = {id(a): [], id(b): [], id(c): []}

    def step(*work: tuple[object, int]) -> None:
        for (sequence, _), logits in zip(work, runner.step(*work), strict=True):
            seen[id(sequence)].append(logits.clone())  # a tape's are valid until the next step

    step((a, 7))
    step((a, 1), (b, 5), (c, 2))
    step((b, 1), (a, 9))
    step((c, 1), (b, 1), (a, 3))
    step((b, 1), (a, 1), (c, 11))
    step((b, 1), (c, 1), (a, 1))
    step((a, 1), (c, 2))
    return [torch.cat(logits) for logits in seen.values()]


def worst_difference(folder: Path, model: PreTrainedModel) -> float:
    """The largest difference between any two logits."""
    tokens = prompts(model.config.get_text_config().vocab_size)
    ours = our_logits(folder, tokens)
    return max(
        float((mine - expected_logits(model, each)).abs().max())
        for mine, each in zip(ours, tokens, strict=True)
    )


def relative_error_in_bfloat16(folder: Path, model: PreTrainedModel) -> float:
    """Of all logits together, against transformers in float32."""
    tokens = prompts(model.config.get_text_config().vocab_size)
    ours = torch.cat(our_logits(folder, tokens, torch.bfloat16))
    expected = torch.cat([expected_logits(model, each) for each in tokens])
    return float((ours - expected).norm() / expected.norm())
