"""The error formats of each family of routes: a whole answer, and an event of a stream.

The class of an error decides its status and TGI's `error_type` (`kagami_proto.errors`). The path of
the request decides the format.
"""

import enum
from collections.abc import Callable, Iterable, Mapping
from http import HTTPStatus
from typing import NamedTuple

from kagami_proto.errors import ContextOverflow, InvalidRequest, KagamiError, row_of
from kagami_router.api.schemas.encoding import encode
from kagami_router.api.schemas.errors import (
    AnthropicError,
    AnthropicErrorResponse,
    ErrorResponse,
    OpenAIError,
    OpenAIErrorResponse,
    OpenAIStreamError,
    OpenAIStreamErrorEvent,
)

_SERVER_ERROR = HTTPStatus.INTERNAL_SERVER_ERROR
_OPENAI_TYPES: Mapping[HTTPStatus, str] = {
    HTTPStatus.UNAUTHORIZED: "authentication_error",
    HTTPStatus.TOO_MANY_REQUESTS: "rate_limit_error",
    HTTPStatus.FAILED_DEPENDENCY: "server_error",
}
_ANTHROPIC_TYPES: Mapping[HTTPStatus, str] = {
    HTTPStatus.UNAUTHORIZED: "authentication_error",
    HTTPStatus.NOT_FOUND: "not_found_error",
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: "request_too_large",
    HTTPStatus.TOO_MANY_REQUESTS: "rate_limit_error",
    HTTPStatus.SERVICE_UNAVAILABLE: "overloaded_error",
    HTTPStatus.FAILED_DEPENDENCY: "api_error",
}

_OVERFLOW_CODE = "context_length_exceeded"


class Family(enum.Enum):
    """The API whose clients call a route; it decides the format of errors."""

    NATIVE = enum.auto()
    OPENAI = enum.auto()
    ANTHROPIC = enum.auto()


class Families:
    """The family of every path, with or without a route.

    A path without a route belongs to the family of the first route with the longest common
    beginning. "/v1/nowhere" has the family of "/v1/chat/completions".
    """

    def __init__(self, routes: Iterable[tuple[str, Family]]) -> None:
        """`routes` are pairs of path and family, in the order of the URL table."""
        paths = list(routes)
        self._by_path = dict(paths)
        for path, family in paths:
            while path := path.rpartition("/")[0]:
                self._by_path.setdefault(path, family)

    def of(self, path: str) -> Family:
        """The family of `path`."""
        while path:
            if family := self._by_path.get(path):
                return family
            path = path.rpartition("/")[0]
        return Family.NATIVE


def error_text(error: KagamiError) -> str:
    """The message, in TGI's words."""
    row = row_of(error)
    return f"{row.prefix if row else ''}{error}"


def error_status(error: KagamiError, family: Family = Family.NATIVE) -> HTTPStatus:
    """The HTTP status of an error."""
    if isinstance(error, ContextOverflow) and family is not Family.NATIVE:
        return HTTPStatus.BAD_REQUEST  # clients look for their words in errors of this status only
    row = row_of(error)
    return row.status if row else HTTPStatus.INTERNAL_SERVER_ERROR


def error_body(error: KagamiError, family: Family = Family.NATIVE) -> bytes:
    """The JSON of a whole error answer."""
    return _SHAPES[family].body(error)


def error_event(error: KagamiError, family: Family) -> bytes:
    """The last bytes of a stream that fails after its status line."""
    return _SHAPES[family].event(error)


class _Shape(NamedTuple):
    body: Callable[[KagamiError], bytes]
    event: Callable[[KagamiError], bytes]


def error_kind(error: KagamiError) -> str:
    """The stable name of an error: TGI's `error_type`."""
    row = row_of(error)
    return row.kind if row else "internal"


def _native(error: KagamiError) -> bytes:
    return encode(ErrorResponse(error_text(error), error_kind(error)))


def _openai(error: KagamiError) -> bytes:
    inner = OpenAIError(
        _openai_text(error), _openai_type(error), _field_of(error), _openai_code(error)
    )
    return encode(OpenAIErrorResponse(inner, error_kind(error)))


def _openai_event(error: KagamiError) -> bytes:
    inner = OpenAIStreamError(
        _openai_text(error),
        error_status(error, Family.OPENAI).value,
        _openai_type(error),
        _field_of(error),
        _openai_code(error),
    )
    return b"data: %b\n\ndata: [DONE]\n\n" % encode(OpenAIStreamErrorEvent(inner))


def _anthropic(error: KagamiError) -> bytes:
    status = error_status(error)
    default = "api_error" if status >= _SERVER_ERROR else "invalid_request_error"
    inner = AnthropicError(_ANTHROPIC_TYPES.get(status, default), _anthropic_text(error))
    return encode(AnthropicErrorResponse("error", inner))


def _openai_text(error: KagamiError) -> str:
    """The message; clients shorten the conversation when they read OpenAI's sentence."""
    if not isinstance(error, ContextOverflow):
        return error_text(error)
    limit = f"This model's maximum context length is {error.limit} tokens."
    prompt, answer = error.num_prompt, error.num_answer
    if answer:
        given = (
            f"you requested {prompt + answer} tokens ({prompt} in the messages, {answer} in the"
            " completion). Please reduce the length of the messages or completion."
        )
    else:
        given = (
            f"your messages resulted in {prompt} tokens. Please reduce the length of the messages."
        )
    # Also in the text: newer openai clients show langchain the text alone, and it looks for this.
    return f"{limit} However, {given} ({_OVERFLOW_CODE}{_estimate_note(error)})"


def _anthropic_text(error: KagamiError) -> str:
    """The message; Anthropic's agents shorten the conversation when they read these words."""
    if not isinstance(error, ContextOverflow):
        return error_text(error)
    return (  # an answer that would not fit is shortened there
        f"prompt is too long: {error.num_prompt} tokens > {error.limit} maximum"
        f"{_estimate_note(error)}"
    )


def _estimate_note(error: ContextOverflow) -> str:
    """Stands behind the sentence: clients read the numbers out of its exact words."""
    return "" if error.is_exact else f"; the prompt has at least {error.num_prompt} tokens"


def _openai_code(error: KagamiError) -> str:
    return _OVERFLOW_CODE if isinstance(error, ContextOverflow) else error_kind(error)


def _openai_type(error: KagamiError) -> str:
    status = error_status(error)
    default = "server_error" if status >= _SERVER_ERROR else "invalid_request_error"
    return _OPENAI_TYPES.get(status, default)


def _field_of(error: KagamiError) -> str | None:
    return error.field if isinstance(error, InvalidRequest) else None


_SHAPES: Mapping[Family, _Shape] = {
    Family.NATIVE: _Shape(_native, lambda error: b"data: %b\n\n" % _native(error)),
    Family.OPENAI: _Shape(_openai, _openai_event),
    Family.ANTHROPIC: _Shape(
        _anthropic, lambda error: b"event: error\ndata: %b\n\n" % _anthropic(error)
    ),
}
