"""The chunks of OpenAI streams, for the OpenAPI document.

The routes do not encode these structs: they join bytes that are encoded once for a stream. A test
checks that the bytes decode as these structs.
"""

from typing import Literal

from msgspec import Struct

from kagami_router.api.schemas.openai import ChatDelta, ChatLogprobs, CompletionLogprobs, Usage


class ChatChunkChoice(Struct, frozen=True):
    """What a chunk adds to one sample of a chat."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"] | None


class ChatChunk(Struct, frozen=True):
    """One event of a chat's stream; `choices` is empty in the one that brings the usage."""

    object: Literal["chat.completion.chunk"]
    id: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChunkChoice]
    usage: Usage | None


class CompletionChunkChoice(Struct, frozen=True):
    """What a chunk adds to one sample of one prompt."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None


class CompletionChunk(Struct, frozen=True):
    """One event of a completion's stream."""

    object: Literal["text_completion"]
    id: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChunkChoice]
    usage: Usage | None
