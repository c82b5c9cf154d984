"""The JSON of errors: one shape for each family of routes."""

from typing import Literal

from msgspec import Struct


class ErrorResponse(Struct, frozen=True):
    """An error of the native routes, whole and in streams."""

    error: str
    error_type: str


class OpenAIError(Struct, frozen=True):
    """The inner part of an error of the OpenAI routes."""

    message: str
    type: str
    param: str | None
    code: str


class OpenAIErrorResponse(Struct, frozen=True):
    """An error of the OpenAI routes; `error_type` is TGI's, for its clients."""

    error: OpenAIError
    error_type: str


class OpenAIStreamError(Struct, frozen=True):
    """The inner part of an error event in a /v1 stream: TGI's two fields, then OpenAI's."""

    message: str
    http_status_code: int
    type: str
    param: str | None
    code: str


class OpenAIStreamErrorEvent(Struct, frozen=True):
    """An error event in a /v1 stream."""

    error: OpenAIStreamError


class AnthropicError(Struct, frozen=True):
    """The inner part of an error of /v1/messages."""

    type: str
    message: str


class AnthropicErrorResponse(Struct, frozen=True):
    """An error of /v1/messages, whole and in streams."""

    type: Literal["error"]
    error: AnthropicError
