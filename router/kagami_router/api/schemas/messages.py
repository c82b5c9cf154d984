"""The JSON of Anthropic's /v1/messages: requests, answers, and the events of a stream.

Types, defaults and key order, as in native.py; the tag `type` distinguishes the variants.
Null means absent, and unknown fields (`cache_control`, `metadata`, `citations`, ...) are ignored.
"""

from typing import Annotated, Any, Literal

from msgspec import Raw, Struct

from kagami_router.api.schemas.encoding import FewMessages, Int32, UInt32

# --- requests ---


class TextBlock(Struct, frozen=True, tag="text"):
    """Text, in either direction."""

    text: str


class ToolUseBlock(Struct, frozen=True, tag="tool_use"):
    """A call that the model has made."""

    id: str
    name: str
    input: Any = None


class ThinkingBlock(Struct, frozen=True, tag="thinking"):
    """What a model has thought; templates that read it get it."""

    thinking: str = ""
    signature: str = ""
    """Clients send it back. It says nothing here: a digest of the text."""


class RedactedThinkingBlock(Struct, frozen=True, tag="redacted_thinking"):
    """What a model has thought in secret: not shown to this one."""


class ImageBlock(Struct, frozen=True, tag="image"):
    """Refused by name."""


class DocumentBlock(Struct, frozen=True, tag="document"):
    """Refused by name."""


class ToolResultBlock(Struct, frozen=True, tag="tool_result"):
    """What a call came to."""

    tool_use_id: str
    content: str | list[TextBlock | ImageBlock | DocumentBlock] | None = None
    is_error: bool | None = None


Block = (
    TextBlock
    | ToolUseBlock
    | ToolResultBlock
    | ThinkingBlock
    | RedactedThinkingBlock
    | ImageBlock
    | DocumentBlock
)


class Message(Struct, frozen=True):
    """One turn of a conversation; neighbours of one role are one turn."""

    role: Literal["user", "assistant", "system"]
    content: str | list[Block]


class ToolDefinition(Struct, frozen=True):
    """A tool of the client; any other `type` than `custom` is one of Anthropic's own servers."""

    name: str = ""
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    type: str | None = None
    strict: bool | None = None


class Choice(Struct, frozen=True):
    """`tool_choice`; `name` goes with the type `tool`."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = None
    disable_parallel_tool_use: bool | None = None


class Thinking(Struct, frozen=True):
    """`thinking`; without it, and when `disabled`, no thinking is shown."""

    type: Literal["enabled", "disabled", "adaptive", "between_tools"]
    display: str | None = None
    """`omitted`: the model thinks, and the answer does not show it"""


class OutputFormat(Struct, frozen=True):
    """The schema that an answer's text has to follow."""

    type: Literal["json_schema"]
    schema: dict[str, Any]


class OutputConfig(Struct, frozen=True):
    """`output_config`; templates may read `effort`."""

    format: OutputFormat | None = None
    effort: str | None = None


class CountTokensRequest(Struct, frozen=True, kw_only=True):
    """Body of /v1/messages/count_tokens."""

    model: str | None = None
    messages: Annotated[list[Message], FewMessages]
    system: str | list[TextBlock] | None = None
    tools: list[ToolDefinition] | None = None
    tool_choice: Choice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = None
    """The older name of `output_config.format`."""


class MessagesRequest(CountTokensRequest, frozen=True, kw_only=True):
    """Body of /v1/messages."""

    max_tokens: UInt32
    temperature: float | None = None
    top_p: float | None = None
    top_k: Int32 | None = None
    stop_sequences: list[str | None] | None = None
    stream: bool | None = None


# --- answers ---


class CallBlock(Struct, frozen=True, tag="tool_use"):
    """A call of a tool; `input` is an object, `{}` where its arguments were cut."""

    id: str
    name: str
    input: Raw


class MessageUsage(Struct, frozen=True):
    """Tokens: of the prompt those that were computed, those found in the cache, of the answer."""

    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int


StopReason = Literal[
    "end_turn", "max_tokens", "stop_sequence", "tool_use", "model_context_window_exceeded"
]


class MessageAnswer(Struct, frozen=True, tag="message"):
    """Answer of /v1/messages; the first event of a stream has one without content."""

    id: str
    role: Literal["assistant"]
    model: str
    content: list[ThinkingBlock | TextBlock | CallBlock]
    stop_reason: StopReason | None
    stop_sequence: str | None
    usage: MessageUsage


class TokensCount(Struct, frozen=True):
    """Answer of /v1/messages/count_tokens."""

    input_tokens: int


# --- the events of a stream ---


class MessageStart(Struct, frozen=True, tag="message_start"):
    """The first event."""

    message: MessageAnswer


class Ping(Struct, frozen=True, tag="ping"):
    """The second event."""


class ContentBlockStart(Struct, frozen=True, tag="content_block_start"):
    """A block begins, without its content."""

    index: int
    content_block: ThinkingBlock | TextBlock | CallBlock


class TextDelta(Struct, frozen=True, tag="text_delta"):
    """More of a text."""

    text: str


class ThinkingDelta(Struct, frozen=True, tag="thinking_delta"):
    """More of what the model thinks."""

    thinking: str


class SignatureDelta(Struct, frozen=True, tag="signature_delta"):
    """The end of what the model thinks."""

    signature: str


class InputJsonDelta(Struct, frozen=True, tag="input_json_delta"):
    """More of a call's input: pieces of one JSON text."""

    partial_json: str


class ContentBlockDelta(Struct, frozen=True, tag="content_block_delta"):
    """More of the block that is open."""

    index: int
    delta: ThinkingDelta | SignatureDelta | TextDelta | InputJsonDelta


class ContentBlockStop(Struct, frozen=True, tag="content_block_stop"):
    """The block is whole."""

    index: int


class Stop(Struct, frozen=True):
    """Why the answer ended."""

    stop_reason: StopReason
    stop_sequence: str | None


class MessageDelta(Struct, frozen=True, tag="message_delta"):
    """What is known at the end."""

    delta: Stop
    usage: MessageUsage


class MessageStop(Struct, frozen=True, tag="message_stop"):
    """The last event."""


MessageEvent = (
    MessageStart
    | Ping
    | ContentBlockStart
    | ContentBlockDelta
    | ContentBlockStop
    | MessageDelta
    | MessageStop
)
