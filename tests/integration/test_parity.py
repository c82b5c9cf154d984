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
    """What transformers generates for each prompt; the short ones are one batch, left-padded."""
    prompts = [tokenizer.encode(prompt).ids for prompt in PROMPTS]
    *short, longest = prompts
    assert max(map(len, short)) < 50 < len(longest)
    return [*generated(model, short), *generated(model, [longest])]


@torch.inference_mode()
def generated(model: PreTrainedModel, prompts: list[list[int]]) -> list[Reference]:
    width, ends = max(map(len, prompts)), model.generation_config.eos_token_id
    missing = [width - len(prompt) for prompt in prompts]
    output = model.generate(
        torch.tensor([ends[:1] * n + prompt for n, prompt in zip(missing, prompts, strict=True)]),
        attention_mask=(torch.arange(width) >= torch.tensor(missing)[:, None]).long(),
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        pad_token_id=ends[0],
        output_logits=True,
        return_dict_in_generate=True,
    )
    scores = torch.stack(output.logits, 1).log_softmax(-1)
    logprobs = scores.gather(-1, output.sequences[:, width:, None])[..., 0]
    found = []
    for ids, each in zip(output.sequences[:, width:].tolist(), logprobs.tolist(), strict=True):
        length = next((n for n, token in enumerate(ids, 1) if token in ends), NEW_TOKENS)
        found.append(Reference(ids[:length], each[:length]))
    return found


@pytest.mark.parametrize(
    ("at_once", "others"), [(1, 0), (5, 11)], ids=["alone", "in batches of 16"]
)
async def test_greedy_is_transformers(
    server: Server, references: list[Reference], at_once: int, others: int
) -> None:
    answers = await generate_all(
        server.url, PROMPTS, at_once=at_once, others=others, max_new_tokens=NEW_TOKENS
    )

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
