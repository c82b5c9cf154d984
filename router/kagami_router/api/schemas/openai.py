"""The JSON of OpenAI's chat completions, completions and models; chunks of streams: chunks.py.

Types, defaults and key order. Unknown fields are ignored, as TGI does. A field typed `Any` is one
that this server only looks at to refuse it by name.
"""

from typing import Annotated, Any, Generic, Literal, TypeVar

from msgspec import UNSET, Meta, Struct, UnsetType

from kagami_router.api.schemas.encoding import FewMessages, Int32, Seed, UInt32

_Choice = TypeVar("_Choice")

# --- requests ---


class StreamOptions(Struct, frozen=True):
    """`stream_options`."""

    include_usage: bool | None = None


class JsonSchemaFormat(Struct, frozen=True):
    """`json_schema` of OpenAI's `response_format`."""

    name: str | None = None
    schema: dict[str, Any] | None = None
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(Struct, frozen=True):
    """`response_format`: OpenAI's form with `json_schema`, or TGI's with `value`."""

    type: Literal["text", "json", "json_object", "regex", "json_schema"]
    json_schema: JsonSchemaFormat | None = None
    value: dict[str, Any] | str | None = None
    schema: dict[str, Any] | None = None
    """Of a `json_object`, as llama.cpp and others send it"""


class StructuredOutputs(Struct, frozen=True):
    """`structured_outputs` of vLLM: one of these."""

    json: dict[str, Any] | str | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: Any = None


class OpenAIRequest(Struct, frozen=True, kw_only=True):
    """What chat and completions have in common; null means absent."""

    model: str | None = None
    max_tokens: UInt32 | None = None
    max_completion_tokens: UInt32 | None = None
    temperature: float | None = None
    top_p: float | None = None
    min_p: float | None = None
    top_k: Int32 | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    stop: str | list[str | None] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    seed: Seed | None = None
    n: UInt32 | None = None
    logit_bias: dict[str, float] | list[float] | None = None
    """OpenAI's object; TGI's list of floats has no meaning there either and is ignored."""
    ignore_eos: bool | None = None
    stop_token_ids: Annotated[list[int], Meta(max_length=64)] | None = None
    include_stop_str_in_output: bool | None = None
    response_format: ResponseFormat | None = None
    # Other spellings of the same: vLLM's, and SGLang's.
    guided_json: dict[str, Any] | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    structured_outputs: StructuredOutputs | None = None
    regex: str | None = None
    ebnf: str | None = None
    json_schema: dict[str, Any] | str | None = None


class ChatReasoning(Struct, frozen=True):
    """`reasoning` of a chat, in OpenRouter's form."""

    effort: str | None = None
    enabled: bool | None = None
    exclude: bool | None = None
    """The model thinks, and the answer does not show it"""


class ThinkingSwitch(Struct, frozen=True):
    """`thinking` of a chat, in DeepSeek's and GLM's form."""

    type: str | None = None
    """`disabled` is off; all others are on"""


class ChatRequest(OpenAIRequest, frozen=True, kw_only=True):
    """Body of /v1/chat/completions and /chat_tokenize; messages go to the template as they are."""

    messages: Annotated[list[dict[str, Any]], FewMessages]
    logprobs: bool | None = None
    top_logprobs: UInt32 | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    tool_prompt: str | None = None
    parallel_tool_calls: bool | None = None
    documents: list[dict[str, Any]] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | str | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    reasoning: ChatReasoning | None = None
    thinking: ThinkingSwitch | bool | None = None
    enable_thinking: bool | None = None
    include_reasoning: bool | None = None


class CompletionRequest(OpenAIRequest, frozen=True, kw_only=True):
    """Body of /v1/completions; a prompt is a text or token ids, and there may be several."""

    prompt: str | list[str | int | list[Any]]
    suffix: str | None = None
    echo: bool | None = None
    best_of: UInt32 | None = None
    logprobs: bool | UInt32 | None = None
    """How many alternatives; true, which is a chat's way to ask, is 1."""


# --- answers ---


class PromptTokensDetails(Struct, frozen=True):
    """What is known of the prompt's tokens."""

    cached_tokens: int


class CompletionTokensDetails(Struct, frozen=True):
    """What is known of the answer's tokens."""

    reasoning_tokens: int


class Usage(Struct, frozen=True):
    """Tokens spent."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails | UnsetType = UNSET
    """Of models that think before they answer"""


class TopLogprob(Struct, frozen=True):
    """One alternative of a chat token."""

    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(Struct, frozen=True):
    """One chat token and its alternatives."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Struct, frozen=True):
    """`logprobs` of a chat choice."""

    content: list[ChatLogprob]
    refusal: None = None


class FunctionCall(Struct, frozen=True):
    """The function a model calls; `arguments` is JSON text."""

    name: str
    arguments: str


class ToolCall(Struct, frozen=True):
    """One call of a whole answer."""

    id: str
    type: str
    function: FunctionCall


class FunctionCallDelta(Struct, frozen=True):
    """More of a call: its name once, then pieces of its arguments."""

    name: str | UnsetType = UNSET
    arguments: str | UnsetType = UNSET


class ToolCallDelta(Struct, frozen=True):
    """A piece of the call that has this index; the first piece has its id, type and name."""

    index: int
    id: str | UnsetType = UNSET
    type: str | UnsetType = UNSET
    function: FunctionCallDelta | UnsetType = UNSET


class ChatDelta(Struct, frozen=True):
    """What a chunk adds to the answer."""

    role: str | UnsetType = UNSET
    content: str | UnsetType | None = UNSET
    tool_calls: list[ToolCallDelta] | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    """What the model thinks before it answers"""
    reasoning: str | UnsetType = UNSET
    """The same under its other name"""


class ChatMessage(Struct, frozen=True):
    """The assistant's answer."""

    role: str
    content: str | None
    tool_calls: list[ToolCall] | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    """What the model thought before it answered"""
    reasoning: str | UnsetType = UNSET
    """The same under its other name"""


class ChatChoice(Struct, frozen=True):
    """One sample of a chat answer."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: str


class CompletionLogprobs(Struct, frozen=True):
    """`logprobs` of a completion: columns of equal length, one entry for each token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    """The alternatives and the token itself."""
    text_offset: list[int]
    """In characters, from the start of the prompt."""


class CompletionChoice(Struct, frozen=True):
    """One sample of one prompt."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str


class OpenAIAnswer(Struct, Generic[_Choice], frozen=True):
    """Answer of /v1/chat/completions and of /v1/completions."""

    object: str
    id: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[_Choice]
    usage: Usage


class Model(Struct, frozen=True):
    """One entry of /v1/models."""

    id: str
    object: str
    created: int
    owned_by: str


class ModelList(Struct, frozen=True):
    """Answer of /v1/models."""

    object: str
    data: list[Model]
