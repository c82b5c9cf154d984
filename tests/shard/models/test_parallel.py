"""Every family on several ranks against itself on one, in float32."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tests.fakes.ranks import run_ranks
from tests.shard.models.parity import our_logits, prompts, run_in_lean_steps, runner_of
from tests.shard.models.test_decoder import CONFIGS, SMALL
from torch import Tensor
from transformers import GPT2Config, LlamaConfig, Olmo2Config, PreTrainedConfig

from kagami_proto.errors import UnsupportedModel
from kagami_shard.backends.torch.load import load_torch
from kagami_shard.machine.distributed import Alone, Group, TensorParallel

Save = Callable[..., tuple[Path, object]]

# Neither the vocabulary (99) nor the mlp (80) is a multiple of 6, and three ranks share each key.
MANY = ["llama", "llama biased, tied", "qwen3", "gemma3_text", "phi3", "olmo2", "starcoder2"]


def logits_of_ranks(folder: Path, size: int) -> list[Tensor]:
    """For each rank: the logits after all tokens of all sequences."""
    tokens = prompts(SMALL["vocab_size"])
    return run_ranks(size, lambda group: torch.cat(our_logits(folder, tokens, parallel=group)))


def assert_ranks_agree(folder: Path, size: int) -> None:
    expected = torch.cat(our_logits(folder, prompts(SMALL["vocab_size"])))
    first, *others = logits_of_ranks(folder, size)
    assert (first - expected).abs().max() < 1e-5
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("name", CONFIGS)
def test_two_ranks_compute_what_one_computes(name: str, save_checkpoint: Save) -> None:
    folder, _ = save_checkpoint(CONFIGS[name])
    assert_ranks_agree(folder, 2)


@pytest.mark.parametrize("name", MANY)
def test_six_ranks_share_two_keys(name: str, save_checkpoint: Save) -> None:
    folder, _ = save_checkpoint(CONFIGS[name])
    assert_ranks_agree(folder, 6)


def test_ranks_agree_in_steps_with_few_logits(save_checkpoint: Save) -> None:
    folder, _ = save_checkpoint(CONFIGS["llama"])
    tokens = prompts(SMALL["vocab_size"])

    def run(group: TensorParallel) -> Tensor:
        seen = run_in_lean_steps(runner_of(folder, parallel=group), tokens)
        return torch.stack([logits for each in seen for logits in each.values()])

    first, second = run_ranks(2, run)
    torch.testing.assert_close(first, run(Alone()), atol=1e-5, rtol=0)
    assert torch.equal(first, second)


def refusals(folder: Path, size: int) -> list[str]:
    def load(group: Group) -> str:
        with pytest.raises(UnsupportedModel) as raised:
            load_torch(folder, dtype=torch.float32, device=torch.device("cpu"), parallel=group)
        return str(raised.value)

    return run_ranks(size, load)


@pytest.mark.parametrize(
    ("config", "size", "text"),
    [
        (
            LlamaConfig(**SMALL),
            4,
            "model type llama cannot be cut: `num_heads` must be divisible by `num_shards` (got "
            "`num_heads`: 6 and `num_shards`: 4): choose another --num-shard",
        ),
        (
            Olmo2Config(**SMALL),
            3,
            "model type olmo2 cannot be cut: `num_key_value_heads` must be divisible by "
            "`num_shards`, or divide it (got `num_key_value_heads`: 2 and `num_shards`: 3): choose "
            "another --num-shard",
        ),
        (
            GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=32),
            2,
            "model type gpt2 runs with transformers' own code and cannot be cut into 2 shards: "
            "start it with --num-shard 1",
        ),
    ],
)
def test_what_cannot_be_cut_is_refused_by_every_rank(
    config: PreTrainedConfig, size: int, text: str, save_checkpoint: Save
) -> None:
    folder, _ = save_checkpoint(config)
    assert refusals(folder, size) == [text] * size


def test_a_rank_keeps_its_part_of_the_cache(save_checkpoint: Save) -> None:
    folder, _ = save_checkpoint(LlamaConfig(**SMALL))

    def layers(group: Group) -> object:
        return load_torch(
            folder, dtype=torch.float32, device=torch.device("cpu"), parallel=group
        ).model.layers

    assert run_ranks(2, layers) == [((1, 8, 8),) * 3] * 2
