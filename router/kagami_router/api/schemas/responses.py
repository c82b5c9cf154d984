"""The JSON of /v1/responses: its request and the Response object; events: response_events.py.

Types, defaults and key order, as in openai.py. A field typed `Any` is one that this server only
looks at to refuse it by name, or one that is read by responses/items.py.
"""

from typing import Annotated, Any, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from kagami_router.api.schemas.encoding import FewMessages, Int32, Seed, UInt32
from kagami_router.api.schemas.openai import ChatLogprob

Metadata = Annotated[dict[str, str], Meta(max_length=16)]


# --- the request ---


class TextFormat(Struct, frozen=True, omit_defaults=True):
    """`text.format`: OpenAI's `response_format` without its inner object."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema: dict[str, Any] | None = None
    strict: bool | None = None


class TextSettings(Struct, frozen=True):
    """`text`; `verbosity` is taken and does nothing."""

    format: TextFormat | None = None
    verbosity: str | None = None


class Reasoning(Struct, frozen=True):
    """`reasoning`: templates may read `effort`, no summaries are made."""

    effort: str | None = None
    summary: str | None = None


class ResponsesRequest(Struct, frozen=True, kw_only=True):
    """Body of /v1/responses; null means absent."""

    model: str | None = None
    input: str | Annotated[list[dict[str, Any]], FewMessages] | None = None
    instructions: str | None = None
    max_output_tokens: UInt32 | None = None
    temperature: float | None = None
    top_p: float | None = None
    text: TextSettings | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    include: list[str] | None = None
    top_logprobs: UInt32 | None = None
    stream: bool | None = None
    reasoning: Reasoning | None = None
    truncation: Literal["auto", "disabled"] | None = None
    """Accepted without effect: a prompt that is too long is refused either way."""
    store: bool | None = None
    """Accepted without effect: no answer is stored."""
    metadata: Metadata | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    background: Any = None
    conversation: Any = None
    previous_response_id: Any = None
    prompt: Any = None
    # Fields that OpenAI's own route does not have; its other routes have them.
    seed: Seed | None = None
    stop: str | list[str | None] | None = None
    top_k: Int32 | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None


# --- the Response object ---


class OutputText(Struct, frozen=True, tag_field="type", tag="output_text"):
    """The text of a message."""

    text: str
    annotations: list[Any]
    """Nothing that this server does makes any."""
    logprobs: list[ChatLogprob]


class OutputMessage(Struct, frozen=True, tag_field="type", tag="message"):
    """What the model says."""

    id: str
    status: str
    role: str
    content: list[OutputText]


class OutputCall(Struct, frozen=True, tag_field="type", tag="function_call"):
    """A function the model calls; `arguments` is JSON text."""

    id: str
    call_id: str
    name: str
    arguments: str
    status: str
    namespace: str | UnsetType = UNSET
    """Of the tools among which the function was offered"""


class OutputCustomCall(Struct, frozen=True, tag_field="type", tag="custom_tool_call"):
    """A tool the model calls with one text."""

    id: str
    call_id: str
    name: str
    input: str
    status: str
    namespace: str | UnsetType = UNSET
    """Of the tools among which it was offered"""


class ReasoningText(Struct, frozen=True, tag_field="type", tag="reasoning_text"):
    """The text of a reasoning item."""

    text: str


class OutputReasoning(Struct, frozen=True, tag_field="type", tag="reasoning"):
    """What the model thinks before it answers. It is shown whole, so there is no summary."""

    id: str
    summary: list[Any]
    content: list[ReasoningText]
    status: str


OutputItem = OutputReasoning | OutputMessage | OutputCall | OutputCustomCall


class InputTokensDetails(Struct, frozen=True):
    """What is known of the prompt's tokens."""

    cached_tokens: int
    cache_write_tokens: int = 0
    """OpenAI's price for keeping a prompt; here it has none."""


class OutputTokensDetails(Struct, frozen=True):
    """What is known of the answer's tokens."""

    reasoning_tokens: int = 0


class ResponseUsage(Struct, frozen=True):
    """Tokens spent."""

    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class ResponseError(Struct, frozen=True):
    """Why a response failed; the codes are OpenAI's."""

    code: str
    message: str


class IncompleteDetails(Struct, frozen=True):
    """Why a response is not whole."""

    reason: str


class TextEcho(Struct, frozen=True, omit_defaults=True):
    """`text` as it was understood."""

    format: TextFormat
    verbosity: str | None = None


class ResponseObject(Struct, frozen=True, kw_only=True):
    """Answer of /v1/responses: what came out, and the settings it was made with."""

    id: str
    object: Literal["response"] = "response"
    created_at: int
    status: str
    background: bool = False
    completed_at: int | None = None
    error: ResponseError | None = None
    incomplete_details: IncompleteDetails | None = None
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: None = None
    model: str
    output: list[OutputItem] = []
    parallel_tool_calls: bool
    previous_response_id: None = None
    prompt_cache_key: str | None
    reasoning: Reasoning
    safety_identifier: str | None
    service_tier: str = "default"
    store: bool = False
    temperature: float
    text: TextEcho
    tool_choice: Any
    tools: list[Any]
    top_logprobs: int
    top_p: float
    truncation: str = "disabled"
    usage: ResponseUsage | None = None
    user: str | None
    metadata: dict[str, str]


class InputTokens(Struct, frozen=True):
    """Answer of /v1/responses/input_tokens."""

    input_tokens: int
    object: Literal["response.input_tokens"] = "response.input_tokens"
