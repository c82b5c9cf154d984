"""What /v1/completions says of a prompt and of its choices, against the model itself."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import openai
import pytest
import pytest_asyncio
import torch
from openai.types.completion_choice import CompletionChoice
from tests.integration.conftest import Server
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, PreTrainedModel

pytestmark = pytest.mark.slow
TEXTS = (
    "The capital of France is Paris, and it lies on the Seine.",
    "日本で一番高い山は富士山です。🗻",
    "def add(a, b):\n    return a + b\n",
)


@pytest.fixture(scope="module")
def model(model_folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer(model_folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(model_folder / "tokenizer.json"))


@pytest_asyncio.fixture
async def client(server: Server) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(
        base_url=f"{server.url}/v1", api_key="-", max_retries=0
    ) as opened:
        yield opened


async def complete(client: openai.AsyncOpenAI, **fields: Any) -> CompletionChoice:
    answer = await client.completions.create(model="tgi", **fields)
    return answer.choices[0]


@torch.inference_mode()
def expected_logprobs(model: PreTrainedModel, ids: list[int]) -> list[float]:
    scores = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    found: list[float] = scores.gather(-1, torch.tensor(ids[1:])[:, None])[:, 0].tolist()
    return found


@pytest.mark.parametrize("text", TEXTS)
async def test_a_prompt_is_scored_as_transformers_does(
    client: openai.AsyncOpenAI, model: PreTrainedModel, tokenizer: Tokenizer, text: str
) -> None:
    answer = await client.completions.create(
        model="tgi", prompt=text, max_tokens=0, echo=True, logprobs=1
    )
    (choice,) = answer.choices
    ids = tokenizer.encode(text).ids
    assert choice.text == text
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 0
    assert choice.logprobs is not None
    first, *others = choice.logprobs.token_logprobs or ()
    assert first is None
    assert others == pytest.approx(expected_logprobs(model, ids), abs=1e-3)


@pytest.mark.parametrize("text", TEXTS)
async def test_offsets_point_at_the_tokens_in_the_text(
    client: openai.AsyncOpenAI, text: str
) -> None:
    choice = await complete(client, prompt=text, max_tokens=8, temperature=0, echo=True, logprobs=0)
    assert choice.logprobs is not None
    tokens, offsets = choice.logprobs.tokens or [], choice.logprobs.text_offset or []
    assert offsets == sorted(offsets)
    for token, offset in zip(tokens, offsets, strict=True):
        assert token.startswith(("bytes:", "<")) or choice.text.startswith(token, offset)


async def test_an_evaluation_harness_scores_a_continuation(
    client: openai.AsyncOpenAI, model: PreTrainedModel, tokenizer: Tokenizer
) -> None:
    """As lm-evaluation-harness: token ids, one generated token, columns cut to the continuation."""
    context = tokenizer.encode("The capital of France is", add_special_tokens=False).ids
    ids = context + tokenizer.encode(" Paris", add_special_tokens=False).ids
    choice = await complete(
        client, prompt=[ids], max_tokens=1, temperature=0, logprobs=1, echo=True, seed=1234
    )
    assert choice.logprobs is not None
    scored = (choice.logprobs.token_logprobs or [])[len(context) : -1]
    expected = expected_logprobs(model, ids)[len(context) - 1 :]
    assert scored == pytest.approx(expected, abs=1e-3)
    # It takes a token for the greedy choice when its logprob is the largest of the column.
    assert _is_greedy(choice, len(context))
    ids[-1] = tokenizer.encode(" Rome", add_special_tokens=False).ids[0]
    other = await complete(client, prompt=[ids], max_tokens=1, logprobs=1, echo=True)
    assert not _is_greedy(other, len(context))


def _is_greedy(choice: CompletionChoice, start: int) -> bool:
    assert choice.logprobs is not None
    scored = (choice.logprobs.token_logprobs or [])[start:-1]
    tops = (choice.logprobs.top_logprobs or [])[start:-1]
    assert scored
    return all(one == max(top.values()) for one, top in zip(scored, tops, strict=True))


async def test_logit_bias_bans_and_forces(client: openai.AsyncOpenAI, tokenizer: Tokenizer) -> None:
    fields = {"prompt": "The capital of France is", "max_tokens": 3, "temperature": 0}
    paris = str(tokenizer.encode(" Paris", add_special_tokens=False).ids[0])
    rome = str(tokenizer.encode(" Rome", add_special_tokens=False).ids[0])
    assert "Paris" in (await complete(client, **fields)).text
    assert "Paris" not in (await complete(client, logit_bias={paris: -100}, **fields)).text
    forced = await complete(client, logit_bias={rome: 100}, **fields)
    assert forced.text == " Rome Rome Rome"


async def test_token_ids_are_the_text_they_stand_for(
    client: openai.AsyncOpenAI, tokenizer: Tokenizer
) -> None:
    fields = {"max_tokens": 12, "temperature": 0}
    by_text = await complete(client, prompt=TEXTS[0], **fields)
    by_ids = await complete(client, prompt=tokenizer.encode(TEXTS[0]).ids, **fields)
    assert by_ids.text == by_text.text


async def test_best_of_is_the_likelier_of_the_two_it_draws(client: openai.AsyncOpenAI) -> None:
    fields = {"prompt": "Once upon a time", "max_tokens": 8, "seed": 7, "logprobs": 0}
    both = await client.completions.create(model="tgi", n=2, **fields)
    best = await complete(client, best_of=2, **fields)
    assert best.text == max(both.choices, key=_mean_logprob).text


def _mean_logprob(choice: CompletionChoice) -> float:
    assert choice.logprobs is not None
    logprobs = choice.logprobs.token_logprobs or []
    return sum(logprobs) / len(logprobs)


async def test_a_stream_says_the_same_as_the_whole_answer(client: openai.AsyncOpenAI) -> None:
    fields = {"prompt": TEXTS[0], "max_tokens": 8, "temperature": 0, "logprobs": 2, "echo": True}
    whole = await complete(client, **fields)
    stream = await client.completions.create(model="tgi", stream=True, **fields)
    parts = [chunk.choices[0] async for chunk in stream]
    assert "".join(part.text for part in parts) == whole.text
    assert whole.logprobs is not None
    tokens = [token for part in parts if part.logprobs for token in part.logprobs.tokens or ()]
    assert tokens == whole.logprobs.tokens
