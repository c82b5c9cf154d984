"""The same tokens as transformers' `generate` on the same checkpoint."""

from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from tests.integration.clients import generate_all, logprobs, token_ids
from tests.integration.conftest import PROMPTS, Server
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel

pytestmark = pytest.mark.slow
NEW_TOKENS = 24


class Reference(NamedTuple):
    ids: list[int]
    logprobs: list[float]


@pytest.fixture(scope="module")
def model(model_folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer(model_folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(model_folder / "tokenizer.json"))


@pytest.fixture(scope="module")
def references(model: PreTrainedModel, tokenizer: Tokenizer) -> list[Reference]:
    return [reference(model, tokenizer.encode(prompt).ids) for prompt in PROMPTS]


@torch.inference_mode()
def reference(model: PreTrainedModel, prompt: list[int]) -> Reference:
    output = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        output_logits=True,
        return_dict_in_generate=True,
    )
    ids = output.sequences[0, len(prompt) :].tolist()
    scores = torch.cat(output.logits).log_softmax(-1)
    return Reference(ids, scores.gather(-1, torch.tensor(ids)[:, None])[:, 0].tolist())


@pytest.mark.parametrize("others", [0, 15], ids=["alone", "among 15 others"])
async def test_greedy_is_transformers(
    server: Server, references: list[Reference], others: int
) -> None:
    answers = await generate_all(server.url, PROMPTS, others=others, max_new_tokens=NEW_TOKENS)

    for prompt, answer, expected in zip(PROMPTS, answers, references, strict=True):
        assert token_ids(answer) == expected.ids, prompt
        assert logprobs(answer) == pytest.approx(expected.logprobs, abs=1e-3), prompt


async def test_bf16_logprobs_stay_within_rounding_noise(
    bf16_server: Server, model: PreTrainedModel, tokenizer: Tokenizer
) -> None:
    first = await generate_all(bf16_server.url, PROMPTS, max_new_tokens=NEW_TOKENS)
    second = await generate_all(bf16_server.url, PROMPTS, max_new_tokens=NEW_TOKENS)

    errors = torch.cat(
        [
            along_path(model, tokenizer.encode(prompt).ids, token_ids(answer))
            - torch.tensor(logprobs(answer))
            for prompt, answer in zip(PROMPTS, first, strict=True)
        ]
    ).abs()
    assert errors.mean() <= 0.02
    assert errors.quantile(0.99) <= 0.15
    assert [token_ids(answer) for answer in first] == [token_ids(answer) for answer in second]


@torch.inference_mode()
def along_path(model: PreTrainedModel, prompt: list[int], ids: list[int]) -> torch.Tensor:
    """The float32 logprobs of `ids` after `prompt`."""
    logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(-1, torch.tensor(ids)[:, None])[:, 0]
