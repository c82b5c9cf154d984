"""/v1/completions: continues one or several prompts, without a chat template."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec
from aiohttp import web

from kagami_proto.errors import (
    BatchSizeExceeded,
    InvalidRequest,
    MalformedBody,
    SuffixNotSupported,
)
from kagami_router.api.answering import grammars
from kagami_router.api.answering.logprobs import Columns
from kagami_router.api.answering.openai_params import max_tokens_of, read_num_choices, read_params
from kagami_router.api.answering.respond import Asked, respond
from kagami_router.api.openai.answer_writer import (
    FINISH_REASON,
    Form,
    Identity,
    OpenAIWriter,
    text_of,
    wants_usage,
)
from kagami_router.api.schemas.encoding import encode
from kagami_router.api.schemas.openai import CompletionChoice, CompletionRequest
from kagami_router.api.web.app_state import state_of
from kagami_router.api.web.call import HttpCall
from kagami_router.api.web.middleware import read_body
from kagami_router.request.prompt import Prompt
from kagami_router.request.validation import GenerationParams, Validation
from kagami_router.request.values import StreamEvent
from kagami_router.serving.infer import Generation
from kagami_router.text.detokenize import TextDecoder

_COMPLETION = msgspec.json.Decoder(CompletionRequest)
_TEXT_CHOICE = (b'{"index":%d,"text":', b',"logprobs":null,"finish_reason":null}')
_PROMPT_FORMS = "expected a text, token ids, or a list of texts or of lists of token ids"


async def completions(request: web.Request) -> web.StreamResponse:
    """One answer, or one chunk for each token."""
    body = await read_body(request, _COMPLETION)
    state, call = state_of(request), HttpCall.of(request)
    if body.suffix is not None:
        raise SuffixNotSupported(
            "Suffix is not supported and can be achieved by preprocessing the prompt.",
            field="suffix",
        )
    validation = state.validation
    given = _split(body.prompt, validation.limits.max_client_batch_size)
    params, num_samples = _params(validation, body)
    prompts = [await _prompt(validation, *one) for one in given]
    shows_output = not _is_scoring(body)
    choices = _Choices(
        [one if isinstance(one, str) else one.text for one in prompts],
        num_choices=body.n or 1,
        echo=bool(body.echo),
        shows_output=shows_output,
        decoder=None if body.logprobs is None or body.logprobs is False else state.decoder,
    )
    form = Form(
        kind="text_completion",
        chunk_kind="text_completion",
        num_samples=num_samples,
        wants_usage=wants_usage(body),
        has_own_usage=True,
        shows_output=shows_output,
    )
    writer = OpenAIWriter(Identity.of("cmpl", call, state, body.model), form, choices)
    asked = [
        Asked(one, params, adds_special_tokens=True, num_samples=num_samples, field="prompt")
        for one in prompts
    ]
    return await respond(request, call, asked, writer, is_stream=bool(body.stream))


@dataclass(slots=True, eq=False)
class _Progress:
    """How far one choice of a stream has come."""

    columns: Columns | None
    is_started: bool = False


class _Choices:
    """Writes the choices of one call: `num_choices` for each prompt, in order of the prompts."""

    def __init__(
        self,
        prompts: Sequence[str],
        *,
        num_choices: int,
        echo: bool,
        shows_output: bool,
        decoder: TextDecoder | None,
    ) -> None:
        self._prompts = prompts
        self._num_choices = num_choices
        self._echo = echo
        self._shows_output = shows_output
        self._decoder = decoder  # None: no logprobs
        self._progress = [
            _Progress(self._columns(prompt)) for prompt in prompts for _ in range(num_choices)
        ]

    def choices(self, generations: Sequence[Generation]) -> list[CompletionChoice]:
        """The choices of a whole answer; the likeliest if there are more generations."""
        num_samples = len(generations) // len(self._prompts)
        chosen = [
            one
            for at in range(0, len(generations), num_samples)
            for one in _best(generations[at : at + num_samples], self._num_choices)
        ]
        return [self._choice(index, one) for index, one in enumerate(chosen)]

    def chunk_choices(self, index: int, event: StreamEvent, finish_reason: bytes) -> list[bytes]:
        """The choice of one chunk; with `echo` the first one begins with the prompt."""
        progress = self._progress[index]
        columns = progress.columns
        if columns is not None and event.prefill:
            columns.add_prompt(event.prefill)
        text = text_of(event) if self._shows_output else ""
        if self._echo and not progress.is_started:
            text = self._prompts[index // self._num_choices] + text
        progress.is_started = True
        if columns is not None and self._shows_output:
            columns.add(event.token, event.top_tokens)
        choice = b'{"index":%d,"text":%b,"logprobs":%b,"finish_reason":%b}' % (
            index,
            encode(text),
            encode(None if columns is None else columns.take()),
            finish_reason,
        )
        return [choice]

    @property
    def reasoning_tokens(self) -> None:
        """None: a completion is nothing but text."""

    @property
    def text_choice(self) -> tuple[bytes, bytes] | None:
        """As `ChoiceWriter` says."""
        return _TEXT_CHOICE if self._decoder is None and self._shows_output else None

    def _choice(self, index: int, generation: Generation) -> CompletionChoice:
        prompt = self._prompts[index // self._num_choices]
        columns = self._columns(prompt)
        if columns is not None:
            columns.add_prompt(generation.prefill)
            for token, alternatives in generation.tokens_with_alternatives():
                columns.add(token, alternatives)
        return CompletionChoice(
            index,
            (prompt if self._echo else "") + generation.end.generated_text,
            None if columns is None else columns.take(),
            FINISH_REASON[generation.end.finish_reason],
        )

    def _columns(self, prompt: str) -> Columns | None:
        return None if self._decoder is None else Columns(self._decoder, prompt)


def _best(samples: Sequence[Generation], count: int) -> Sequence[Generation]:
    if len(samples) == count:
        return samples
    return sorted(samples, key=lambda one: one.mean_logprob, reverse=True)[:count]


def _is_scoring(body: CompletionRequest) -> bool:
    """Whether only the prompt's logprobs are wanted; evaluation harnesses ask in this way."""
    return bool(body.echo) and max_tokens_of(body) == 0


def _params(validation: Validation, body: CompletionRequest) -> tuple[GenerationParams, int]:
    """The parameters for each prompt, and the number of generations."""
    num_logprobs = _num_logprobs(body, validation.limits.max_top_n_tokens)
    num_choices = read_num_choices(body, validation.limits.max_best_of)
    is_scoring = _is_scoring(body)
    max_tokens = 1 if is_scoring else max_tokens_of(body)
    params = read_params(validation, body, max_tokens, num_logprobs or 0)
    params = replace(params, grammar=grammars.asked(body))
    num_samples = _num_samples(body, num_choices, validation.limits.max_best_of)
    has_prompt_logprobs = bool(body.echo) and num_logprobs is not None
    return (
        replace(params, prompt_logprobs=has_prompt_logprobs),
        num_choices if is_scoring else num_samples,
    )


def _num_samples(body: CompletionRequest, num_choices: int, limit: int) -> int:
    """How many generations to choose from."""
    best_of = body.best_of or num_choices
    if best_of > limit:
        raise InvalidRequest(
            f"`best_of` must be > 0 and <= {limit}. Given: {best_of}", field="best_of"
        )
    if best_of < num_choices:
        raise InvalidRequest(
            f"`best_of` must be >= `n`, which is {num_choices}. Given: {best_of}", field="best_of"
        )
    if body.stream and best_of > num_choices:
        raise InvalidRequest(
            f"`best_of` > `n` is not supported when streaming tokens. Given: {best_of}",
            field="best_of",
        )
    return best_of


def _num_logprobs(body: CompletionRequest, limit: int) -> int | None:
    """The number of alternatives for each token; None = no logprobs at all."""
    if body.logprobs is None or body.logprobs is False:
        return None
    count = int(body.logprobs)
    if count > limit:
        raise InvalidRequest(
            f"`logprobs` must be >= 0 and <= {limit}. Given: {count}", field="logprobs"
        )
    return count


def _split(prompt: str | list[Any], max_prompts: int) -> list[tuple[str, str | list[Any]]]:
    """Each prompt with its place in the body; does not check token ids."""
    if isinstance(prompt, str):
        return [("prompt", prompt)]
    if not prompt:
        raise MalformedBody(
            "prompt: Empty array detected. Do not use an empty array for the prompt.",
            field="prompt",
        )
    if isinstance(prompt[0], int):
        return [("prompt", prompt)]
    if len(prompt) > max_prompts:
        raise BatchSizeExceeded(
            f"Number of prompts exceeds the maximum allowed batch size of {max_prompts}",
            field="prompt",
        )
    if not all(isinstance(one, type(prompt[0])) for one in prompt):
        raise MalformedBody(f"prompt: {_PROMPT_FORMS}", field="prompt")
    return [(f"prompt[{index}]", one) for index, one in enumerate(prompt)]


async def _prompt(validation: Validation, place: str, given: str | list[Any]) -> str | Prompt:
    return given if isinstance(given, str) else await validation.token_prompt(given, place)
