"""Converts OpenAI's parameters to `GenerationParams`, for all routes that take them."""

from collections.abc import Mapping
from dataclasses import replace

from kagami_proto.errors import InvalidRequest
from kagami_router.api.schemas.openai import OpenAIRequest
from kagami_router.request.validation import MAX_SEED, GenerationParams, Validation

_MAX_ID_DIGITS = 10  # of 2**32
# OpenAI's limit. The biases are sent again each time a sequence is replayed to a shard.
MAX_BIASED_IDS = 1024


def max_tokens_of(body: OpenAIRequest) -> int | None:
    """`max_completion_tokens`, or `max_tokens`, its older name, without it."""
    return body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens


def seed_of(given: int | None) -> int | None:
    """A signed seed as the unsigned one with the same 64 bits."""
    return given if given is None or given >= 0 else given & MAX_SEED


def read_params(
    validation: Validation, body: OpenAIRequest, max_tokens: int | None, top_n_tokens: int = 0
) -> GenerationParams:
    """The parameters of each generation; raises `InvalidRequest` for what is wrong in any prompt.

    Sampling is on unless temperature or top_p is 0; top_p 1 and top_k below 1 are off.
    """
    stop = (body.stop,) if isinstance(body.stop, str) else filter(None, body.stop or ())
    params = GenerationParams(
        do_sample=True,
        temperature=body.temperature or None,
        top_p=None if body.top_p in (0, 1) else body.top_p,
        top_k=None if (body.top_k or 0) < 1 else body.top_k,
        min_p=body.min_p,
        repetition_penalty=body.repetition_penalty,
        frequency_penalty=body.frequency_penalty,
        presence_penalty=body.presence_penalty,
        max_new_tokens=max_tokens,
        stop=tuple(stop),
        stop_token_ids=tuple(body.stop_token_ids or ()),
        keep_stop=bool(body.include_stop_str_in_output),
        ignore_eos=bool(body.ignore_eos),
        seed=seed_of(body.seed),
        top_n_tokens=top_n_tokens,
        logit_bias=_logit_bias(body.logit_bias),
    )
    validation.check_params(params)
    if body.temperature == 0 or body.top_p == 0:
        return replace(
            params, do_sample=False, temperature=None, top_p=None, top_k=None, min_p=None
        )
    return params


def read_num_choices(body: OpenAIRequest, limit: int) -> int:
    """`n`; --max-best-of (`limit`) limits it, as it limits `best_of`."""
    count = 1 if body.n is None else body.n
    if not 0 < count <= limit:
        raise InvalidRequest(f"`n` must be > 0 and <= {limit}. Given: {count}", field="n")
    return count


def _logit_bias(given: Mapping[str, float] | list[float] | None) -> tuple[tuple[int, float], ...]:
    """Pairs of token id and bias. JSON's keys are texts. TGI's form, a list, is ignored."""
    if not isinstance(given, Mapping):
        return ()
    if len(given) > MAX_BIASED_IDS:
        raise InvalidRequest(
            f"`logit_bias` supports up to {MAX_BIASED_IDS} token ids. Given: {len(given)}",
            field="logit_bias",
        )
    for key in given:
        if not (key.isascii() and key.isdecimal() and len(key) <= _MAX_ID_DIGITS):
            raise InvalidRequest(
                f"`logit_bias` has token ids as its keys. Given: {key[:40]!r}", field="logit_bias"
            )
    return tuple((int(key), bias) for key, bias in given.items())
