"""The three routes that can be measured: how a request's body is made and an event is read.

Only the counted parts of an event are decoded.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgspec
from msgspec import Struct

from kagami_benchmark.prompts import Prompt
from kagami_benchmark.targets import CHAT, COMPLETIONS, NATIVE


class Seen(NamedTuple):
    """What one event brought. Counts are the server's own, None where it says nothing of them."""

    has_token: bool
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    error: str = ""


@dataclass(frozen=True, slots=True)
class Asking:
    """What all requests of a benchmark have in common."""

    model: str
    ignore_eos: bool
    as_ids: bool
    sampling: Mapping[str, float | int | bool]
    """Sampling parameters by their native names, without those that were not given."""


class Route(NamedTuple):
    """How to write the requests of one route and read its events."""

    body: Callable[[Prompt, Asking], dict[str, Any]]
    read: Callable[[bytes], Seen]
    sampling: frozenset[str]
    """The sampling parameters that the route knows, by their native names."""


# --- native ---


class _Token(Struct):
    id: int


class _Details(Struct):
    generated_tokens: int
    input_length: int | None = None


class _NativeEvent(Struct):
    token: _Token | None = None
    details: _Details | None = None
    error: str = ""


_NATIVE = msgspec.json.Decoder(_NativeEvent)


def _native_body(prompt: Prompt, asking: Asking) -> dict[str, Any]:
    return {
        "inputs": prompt.text,
        "parameters": {
            "max_new_tokens": prompt.max_new_tokens,
            "ignore_eos": asking.ignore_eos,
            "details": True,
            **asking.sampling,
        },
    }


def _read_native(data: bytes) -> Seen:
    event = _NATIVE.decode(data)
    if event.details is None:
        return Seen(event.token is not None, error=event.error)
    counted = event.details
    return Seen(event.token is not None, counted.input_length, counted.generated_tokens)


# --- OpenAI's ---


class _Delta(Struct):
    content: str | None = None
    reasoning_content: str | None = None


class _Choice(Struct):
    text: str | None = None
    delta: _Delta | None = None


class _Usage(Struct):
    prompt_tokens: int
    completion_tokens: int


class _Chunk(Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


_CHUNK = msgspec.json.Decoder(_Chunk)


def _openai_body(prompt: Prompt, asking: Asking) -> dict[str, Any]:
    body = {
        "model": asking.model,
        "max_tokens": prompt.max_new_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0,
        **asking.sampling,
    }
    return body | {"ignore_eos": True} if asking.ignore_eos else body


def _completions_body(prompt: Prompt, asking: Asking) -> dict[str, Any]:
    text = list(prompt.ids or ()) if asking.as_ids else prompt.text
    return {"prompt": text, **_openai_body(prompt, asking)}


def _chat_body(prompt: Prompt, asking: Asking) -> dict[str, Any]:
    messages = [{"role": "user", "content": prompt.text}]
    return {"messages": messages, **_openai_body(prompt, asking)}


def _read_chunk(data: bytes) -> Seen:
    if data == b"[DONE]":
        return Seen(False)
    chunk = _CHUNK.decode(data)
    if chunk.error is not None:
        error = chunk.error
        return Seen(False, error=str(error["message"] if isinstance(error, dict) else error))
    has_text = any(map(_has_text, chunk.choices))
    if chunk.usage is None:
        return Seen(has_text)
    return Seen(has_text, chunk.usage.prompt_tokens, chunk.usage.completion_tokens)


def _has_text(choice: _Choice) -> bool:
    """Whether the chunk has a token; a first chunk that only names the role has none."""
    delta = choice.delta
    return bool(choice.text or (delta and (delta.content or delta.reasoning_content)))


_OPENAI_SAMPLING = frozenset(("temperature", "top_p", "top_k", "frequency_penalty"))
ROUTES: Mapping[str, Route] = {
    NATIVE: Route(
        _native_body,
        _read_native,
        _OPENAI_SAMPLING
        | {"typical_p", "repetition_penalty", "watermark", "do_sample", "top_n_tokens"},
    ),
    COMPLETIONS: Route(_completions_body, _read_chunk, _OPENAI_SAMPLING),
    CHAT: Route(_chat_body, _read_chunk, _OPENAI_SAMPLING),
}
