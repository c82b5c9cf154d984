"""The native routes: /generate, /generate_stream and `/`, which is either of them."""

from collections.abc import Sequence

import msgspec
from aiohttp import web
from msgspec import UNSET, UnsetType

from kagami_router.api.answering import grammars
from kagami_router.api.native.service import front_of, json_response
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
from kagami_router.api.web.call import (
    Call,
    Finished,
    log_success,
    stream_comment,
    stream_headers,
    whole_headers,
)
from kagami_router.api.web.middleware import read_body
from kagami_router.request.validation import GenerationParams, samples
from kagami_router.request.values import StreamEvent, Token, ValidRequest
from kagami_router.serving.infer import Events, Generation

_GENERATE = msgspec.json.Decoder(GenerateRequest)
_COMPAT = msgspec.json.Decoder(CompatGenerateRequest)
# TGI samples when there is no `parameters` at all, and is greedy for an empty one.
_NO_PARAMETERS = GenerateParameters(do_sample=True)


async def generate(request: web.Request) -> web.StreamResponse:
    """One object."""
    body = await read_body(request, _GENERATE)
    answer, headers = await _whole(request, body.inputs, given(body.parameters), False)
    return json_response(answer, **headers)


async def generate_stream(request: web.Request) -> web.StreamResponse:
    """One event for each token."""
    body = await read_body(request, _GENERATE)
    return await _stream(request, body.inputs, given(body.parameters), False)


async def compat_generate(request: web.Request) -> web.StreamResponse:
    """A stream, or a list of one object; the prompt is part of the text unless refused.

    TGI takes `return_full_text` for true here where the model's pipeline tag is unknown, as it is
    for every local checkpoint.
    """
    body = await read_body(request, _COMPAT)
    parameters = given(body.parameters)
    if body.stream:
        return await _stream(request, body.inputs, parameters, True)
    answer, headers = await _whole(request, body.inputs, parameters, True)
    return json_response([answer], **headers)


def given(parameters: GenerateParameters | UnsetType) -> GenerateParameters:
    """The parameters of a body; TGI samples where there are none."""
    return _NO_PARAMETERS if parameters is UNSET else parameters


def params_of(wire: GenerateParameters) -> GenerationParams:
    """The parameters in the terms of the door."""
    return GenerationParams(
        best_of=wire.best_of,
        do_sample=wire.do_sample,
        temperature=wire.temperature,
        repetition_penalty=wire.repetition_penalty,
        frequency_penalty=wire.frequency_penalty,
        top_k=wire.top_k,
        top_p=wire.top_p,
        typical_p=wire.typical_p,
        max_new_tokens=wire.max_new_tokens,
        stop=tuple(wire.stop),
        ignore_eos=bool(wire.ignore_eos),
        truncate=wire.truncate,
        prompt_logprobs=wire.decoder_input_details,
        seed=wire.seed,
        top_n_tokens=wire.top_n_tokens,
        grammar=grammars.native(wire.grammar),
        watermark=wire.watermark,
        unsupported={"adapter_id": wire.adapter_id},
    )


async def _whole(
    request: web.Request, prompt: str, wire: GenerateParameters, full_text_default: bool
) -> tuple[GenerateResponse, dict[str, str]]:
    front, call, params = front_of(request), Call.of(request), params_of(wire)
    front.validation.check_best_of(params)
    with front.infer.permits(params.num_samples):
        valid = await front.validation.validate(prompt, params, add_special_tokens=True)
        generations = await front.infer.collect_all(samples(valid, params.num_samples), call.tally)
    best, *others = sorted(generations, key=lambda one: one.mean_logprob, reverse=True)
    is_full = full_text_default if wire.return_full_text is None else wire.return_full_text
    prefix = prompt if is_full else ""
    details = (
        _details(best, others, prefix) if wire.details or wire.decoder_input_details else UNSET
    )
    winner = [Finished(best.request, best.end)]
    log_success(call, winner)
    return (
        GenerateResponse(prefix + best.end.generated_text, details),
        whole_headers(front.compute_type, [prompt], call, winner),
    )


async def _stream(
    request: web.Request, prompt: str, wire: GenerateParameters, full_text_default: bool
) -> web.StreamResponse:
    front, call, params = front_of(request), Call.of(request), params_of(wire)
    front.validation.check_stream(params)
    with front.infer.permits():
        valid = await front.validation.validate(prompt, params, add_special_tokens=True)
        is_full = full_text_default if wire.return_full_text is None else wire.return_full_text
        events = _EventWriter(call, valid, prompt if is_full else "", wire.details)
        return await sse.respond(
            request,
            front.infer.stream(valid, call.tally),
            render=events.render,
            last=events.last,
            headers=stream_headers(front.compute_type, call, [valid]),
        )


# Nearly every event of a stream: a `StreamResponse` of a token and nothing else.
_PLAIN_EVENT = b'data: {"index":%d,"token":%b,"generated_text":null,"details":null}\n\n'


class _EventWriter:
    """Writes the events of one native stream."""

    def __init__(self, call: Call, request: ValidRequest, prefix: str, has_details: bool) -> None:
        self._call = call
        self._request = request
        self._prefix = prefix
        self._has_details = has_details
        self._index = 0
        self._finished: list[Finished] = []

    def render(self, events: Events) -> bytes:
        """The events of one turn."""
        if len(events) == 1:
            return self._render_one(events[0])
        return b"".join([self._render_one(event) for event in events])

    def last(self) -> bytes:
        """A native stream just ends; its times come as a comment."""
        log_success(self._call, self._finished)
        return stream_comment(self._call, self._finished)

    def _render_one(self, event: StreamEvent) -> bytes:
        self._index += 1
        token, top_tokens, tail, end, _ = event
        if end is None and not tail and not top_tokens:
            token_id, shown, logprob, special = token
            out = TokenOut(token_id, shown, shortest(logprob), special)
            return _PLAIN_EVENT % (self._index, encode(out))
        text = f"{event.tail}{token.text}" if token.special else f"{token.text}{event.tail}"
        generated_text, details = None, None
        if end is not None:
            self._finished.append(Finished(self._request, end))
            generated_text = self._prefix + end.generated_text
            if self._has_details:
                sampling = self._request.sampling
                details = StreamDetails(
                    finish_reason=end.finish_reason.value,
                    generated_tokens=end.num_generated,
                    seed=sampling.seed if sampling.do_sample else None,
                    input_length=len(self._request.prompt_ids),
                )
        return sse.event(
            encode(
                StreamResponse(
                    self._index,
                    TokenOut(token.id, text, shortest(token.logprob), token.special),
                    _tokens(event.top_tokens) if event.top_tokens else UNSET,
                    generated_text,
                    details,
                )
            )
        )


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
