"""The native routes: /generate, /generate_stream, and `/`, which acts as either of them."""

from collections.abc import Sequence

import msgspec
from aiohttp import web
from msgspec import UNSET, UnsetType

from kagami_proto.errors import KagamiError
from kagami_router.api.answering import grammars
from kagami_router.api.answering.respond import Asked, respond
from kagami_router.api.schemas.encoding import encode, shortest
from kagami_router.api.schemas.native import (
    BestOfSequence,
    CompatGenerateRequest,
    Details,
    GenerateParameters,
    GenerateRequest,
    GenerateResponse,
    PrefillTokenOut,
    StreamDetails,
    StreamResponse,
    TokenOut,
)
from kagami_router.api.web import sse
from kagami_router.api.web.app_state import state_of
from kagami_router.api.web.call import Finished, HttpCall
from kagami_router.api.web.errors import Family, error_event
from kagami_router.api.web.middleware import read_body
from kagami_router.request.validation import GenerationParams
from kagami_router.request.values import End, StreamEvent, Token, ValidRequest
from kagami_router.serving.infer import Generation

_GENERATE = msgspec.json.Decoder(GenerateRequest)
_COMPAT = msgspec.json.Decoder(CompatGenerateRequest)
# TGI samples when there is no `parameters` at all, and is greedy for an empty one.
_NO_PARAMETERS = GenerateParameters(do_sample=True)


async def generate(request: web.Request) -> web.StreamResponse:
    """One object."""
    body = await read_body(request, _GENERATE)
    return await _respond(request, body, is_stream=False)


async def generate_stream(request: web.Request) -> web.StreamResponse:
    """One event for each token."""
    body = await read_body(request, _GENERATE)
    return await _respond(request, body, is_stream=True)


async def compat_generate(request: web.Request) -> web.StreamResponse:
    """A stream, or a list of one object; the prompt is part of the text unless refused.

    TGI takes `return_full_text` for true here where the model's pipeline tag is unknown, as it is
    for every local checkpoint.
    """
    body = await read_body(request, _COMPAT)
    return await _respond(request, body, is_stream=body.stream, is_compat=True)


async def _respond(
    request: web.Request,
    body: GenerateRequest | CompatGenerateRequest,
    *,
    is_stream: bool,
    is_compat: bool = False,
) -> web.StreamResponse:
    parameters = given(body.parameters)
    validation = state_of(request).validation
    call, params = HttpCall.of(request), params_of(parameters)
    if is_stream:
        validation.check_stream(params)
    else:
        validation.check_best_of(params)
    is_full = is_compat if parameters.return_full_text is None else parameters.return_full_text
    writer = _Writer(
        body.inputs if is_full else "",
        has_details=parameters.details or (parameters.decoder_input_details and not is_stream),
        is_list=is_compat,
    )
    asked = Asked(
        body.inputs,
        params,
        adds_special_tokens=True,
        num_samples=1 if is_stream else params.num_samples,
    )
    return await respond(request, call, [asked], writer, is_stream=is_stream)


def given(parameters: GenerateParameters | UnsetType) -> GenerateParameters:
    """The parameters of a body; without any, TGI samples."""
    return _NO_PARAMETERS if parameters is UNSET else parameters


def params_of(given: GenerateParameters) -> GenerationParams:
    """The parameters as validation takes them."""
    return GenerationParams(
        best_of=given.best_of,
        do_sample=given.do_sample,
        temperature=given.temperature,
        repetition_penalty=given.repetition_penalty,
        frequency_penalty=given.frequency_penalty,
        top_k=given.top_k,
        top_p=given.top_p,
        typical_p=given.typical_p,
        min_p=given.min_p,
        max_new_tokens=given.max_new_tokens,
        stop=tuple(given.stop),
        ignore_eos=bool(given.ignore_eos),
        truncate=given.truncate,
        prompt_logprobs=given.decoder_input_details,
        seed=given.seed,
        top_n_tokens=given.top_n_tokens,
        grammar=grammars.native(given.grammar),
        watermark=given.watermark,
        unsupported={"adapter_id": given.adapter_id},
    )


# The bytes of a `StreamResponse` with a token and nothing else: nearly every event of a stream.
_TOKEN_EVENT = b'data: {"index":%d,"token":%b,"generated_text":null,"details":null}\n\n'


class _Writer:
    """Writes the answer of one native call, as `respond.AnswerWriter` says."""

    def __init__(self, prefix: str, *, has_details: bool, is_list: bool) -> None:
        self._prefix = prefix
        self._has_details = has_details
        self._is_list = is_list
        self._request: ValidRequest | None = None
        self._index = 0

    def whole(self, generations: Sequence[Generation]) -> GenerateResponse | list[GenerateResponse]:
        """The likeliest sample; its details have the others."""
        best, *others = _likeliest_first(generations)
        details = _details(best, others, self._prefix) if self._has_details else UNSET
        answer = GenerateResponse(self._prefix + best.end.generated_text, details)
        return [answer] if self._is_list else answer

    def chosen(self, generations: Sequence[Generation]) -> Sequence[Generation]:
        """The likeliest sample."""
        return _likeliest_first(generations)[:1]

    def counted(self, end: End) -> End:
        """The end, unchanged."""
        return end

    def start(self, requests: Sequence[ValidRequest]) -> bytes:
        """Nothing precedes the first token."""
        (self._request,) = requests
        return b""

    def event(self, index: int, event: StreamEvent) -> bytes:
        """One token; the last event also has the whole text."""
        self._index += 1
        token, top_tokens, tail, end, _ = event
        if end is None and not tail and not top_tokens:
            token_id, shown, logprob, special = token
            out = TokenOut(token_id, shown, shortest(logprob), special)
            return _TOKEN_EVENT % (self._index, encode(out))
        text = f"{tail}{token.text}" if token.special else f"{token.text}{tail}"
        return sse.event(
            encode(
                StreamResponse(
                    self._index,
                    TokenOut(token.id, text, shortest(token.logprob), token.special),
                    _tokens(top_tokens) if top_tokens else UNSET,
                    None if end is None else self._prefix + end.generated_text,
                    None if end is None or not self._has_details else self._stream_details(end),
                )
            )
        )

    def end(self, finished: Sequence[Finished], comment: bytes) -> bytes:
        """Only the comment: native streams have no end marker."""
        return comment

    def failed(self, error: KagamiError) -> bytes:
        """The error in TGI's format."""
        return error_event(error, Family.NATIVE)

    def _stream_details(self, end: End) -> StreamDetails:
        assert self._request is not None, "a stream has started"
        sampling = self._request.sampling
        return StreamDetails(
            finish_reason=end.finish_reason.value,
            generated_tokens=end.num_generated,
            seed=sampling.seed if sampling.do_sample else None,
            input_length=len(self._request.prompt_ids),
        )


def _likeliest_first(generations: Sequence[Generation]) -> Sequence[Generation]:
    return sorted(generations, key=lambda one: one.mean_logprob, reverse=True)


def _details(best: Generation, others: Sequence[Generation], prefix: str) -> Details:
    return Details(
        finish_reason=best.end.finish_reason.value,
        generated_tokens=best.end.num_generated,
        seed=best.seed,
        prefill=_prefill(best),
        tokens=_tokens(best.tokens),
        best_of_sequences=[_other(one, prefix) for one in others] if others else UNSET,
        top_tokens=_top_tokens(best),
    )


def _other(generation: Generation, prefix: str) -> BestOfSequence:
    return BestOfSequence(
        generated_text=prefix + generation.end.generated_text,
        finish_reason=generation.end.finish_reason.value,
        generated_tokens=generation.end.num_generated,
        seed=generation.seed,
        prefill=_prefill(generation),
        tokens=_tokens(generation.tokens),
        top_tokens=_top_tokens(generation),
    )


def _prefill(generation: Generation) -> list[PrefillTokenOut]:
    return [
        PrefillTokenOut(
            token.id, token.text, None if token.logprob is None else shortest(token.logprob)
        )
        for token in generation.prefill
    ]


def _tokens(tokens: Sequence[Token]) -> list[TokenOut]:
    return [
        TokenOut(token.id, token.text, shortest(token.logprob), token.special) for token in tokens
    ]


def _top_tokens(generation: Generation) -> list[list[TokenOut]] | UnsetType:
    if not generation.top_tokens:
        return UNSET
    return [_tokens(alternatives) for alternatives in generation.top_tokens]
