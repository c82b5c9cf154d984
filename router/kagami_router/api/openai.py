"""What chat and completions share: OpenAI's parameters, finish reasons, usage, chunks, errors."""

from collections.abc import Mapping, Sequence

from kagami_proto.errors import InvalidRequest, KagamiError
from kagami_router.api import sse
from kagami_router.api.answers import Finished
from kagami_router.api.middleware import error_status, error_text
from kagami_router.api.schemas import (
    OpenAIRequest,
    OpenAIStreamError,
    OpenAIStreamErrorEvent,
    Usage,
    encode,
)
from kagami_router.api.service import Front
from kagami_router.requests import FinishReason, StreamEvent, ValidRequest
from kagami_router.validation import GenerationParams

FINISH_REASON: Mapping[FinishReason, str] = {
    FinishReason.LENGTH: "length",
    FinishReason.EOS_TOKEN: "stop",
    FinishReason.STOP_SEQUENCE: "stop",
}
FINISH_REASON_JSON = {reason: encode(text) for reason, text in FINISH_REASON.items()}


def params(body: OpenAIRequest, max_tokens: int | None, top_n_tokens: int = 0) -> GenerationParams:
    """OpenAI's parameters in the native terms.

    Sampling is on unless temperature or top_p is 0; top_p 1 and top_k below 1 are off.
    """
    if body.logit_bias:
        raise InvalidRequest("`logit_bias` is not supported yet")
    is_greedy = body.temperature == 0 or body.top_p == 0
    top_p = None if body.top_p == 1 else body.top_p
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    return GenerationParams(
        do_sample=not is_greedy,
        temperature=None if is_greedy else body.temperature,
        top_p=None if is_greedy else top_p,
        top_k=None if is_greedy or (body.top_k or 0) < 1 else body.top_k,
        repetition_penalty=body.repetition_penalty,
        frequency_penalty=body.frequency_penalty,
        presence_penalty=body.presence_penalty,
        max_new_tokens=max_tokens,
        stop=tuple(stop),
        keep_stop=False,
        ignore_eos=bool(body.ignore_eos),
        seed=body.seed,
        top_n_tokens=top_n_tokens,
    )


def num_samples(front: Front, body: OpenAIRequest) -> int:
    """`n`, which --max-best-of limits as it limits `best_of`."""
    count = 1 if body.n is None else body.n
    limit = front.validation.limits.max_best_of
    if not 0 < count <= limit:
        raise InvalidRequest(f"`n` must be > 0 and <= {limit}. Given: {count}")
    return count


def text_of(event: StreamEvent) -> str:
    """The text that a chunk adds: special tokens have none."""
    return event.tail if event.token.special else event.token.text + event.tail


def wants_usage(body: OpenAIRequest) -> bool:
    """Whether the stream ends with a chunk of usage."""
    return body.stream_options is not None and bool(body.stream_options.include_usage)


def usage_of(prompts: Sequence[ValidRequest], finished: Sequence[Finished]) -> Usage:
    """Tokens of a call: each prompt once, whatever number of samples it has."""
    prompt_tokens = sum(len(one.prompt_ids) for one in prompts)
    completion_tokens = sum(one.end.num_generated for one in finished)
    return Usage(prompt_tokens, completion_tokens, prompt_tokens + completion_tokens)


def chunk_head(kind: str, chunk_id: str, created: int, model: str, fingerprint: str) -> bytes:
    """What the chunks of a stream have in common: an object left open, up to `choices`."""
    return b'{"object":%b,"id":%b,"created":%d,"model":%b,"system_fingerprint":%b,' % (
        encode(kind),
        encode(chunk_id),
        created,
        encode(model),
        encode(fingerprint),
    )


def error_event(error: KagamiError) -> bytes:
    """A failure after the status line, as OpenAI's clients read it, and the end marker."""
    inner = OpenAIStreamError(error_text(error), error_status(error).value)
    return sse.event(encode(OpenAIStreamErrorEvent(inner))) + sse.DONE
