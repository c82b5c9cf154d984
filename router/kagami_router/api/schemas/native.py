"""The wire's JSON: requests as TGI's and OpenAI's clients send them, answers as they expect them.

Types, defaults and key order; the rules are in validation.py. Nothing behind `api/` sees these
structs. Unknown fields are ignored, as TGI does. A field typed `Any` is one that this server only
looks at to refuse it by name.
"""

import math
from typing import Annotated, Any, Generic, Literal, TypeVar

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

_Choice = TypeVar("_Choice")

UInt32 = Annotated[int, Meta(ge=0, le=2**32 - 1)]
Int32 = Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)]
# 64 bits do not fit into a Meta limit; validation.py has the upper bound.
UInt64 = Annotated[int, Meta(ge=0)]


# --- native routes: requests ---


class GrammarType(Struct, frozen=True):
    """`grammar` of the native routes; the value of a schema is an object or its JSON text."""

    type: Literal["json", "json_object", "regex", "json_schema"]
    value: dict[str, Any] | str


class GenerateParameters(Struct, frozen=True):
    """`parameters` of the native routes; TGI's defaults."""

    best_of: UInt32 | None = None
    temperature: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    top_k: Int32 | None = None
    top_p: float | None = None
    typical_p: float | None = None
    do_sample: bool = False
    max_new_tokens: UInt32 | None = None
    return_full_text: bool | None = None
    stop: list[str] = []
    truncate: UInt32 | None = None
    watermark: bool = False
    details: bool = False
    decoder_input_details: bool = False
    seed: UInt64 | None = None
    top_n_tokens: UInt32 | None = None
    grammar: GrammarType | None = None
    adapter_id: str | None = None
    ignore_eos: bool | None = None


class GenerateRequest(Struct, frozen=True):
    """Body of /generate, /generate_stream and /tokenize; without `parameters` TGI samples."""

    inputs: str
    parameters: GenerateParameters | UnsetType = UNSET


class CompatGenerateRequest(Struct, frozen=True):
    """Body of `/`."""

    inputs: str
    parameters: GenerateParameters | UnsetType = UNSET
    stream: bool = False


# --- native routes: answers ---


class TokenOut(Struct, frozen=True):
    """One generated token."""

    id: int
    text: str
    logprob: float | None
    special: bool


class PrefillTokenOut(Struct, frozen=True):
    """One prompt token."""

    id: int
    text: str
    logprob: float | None


class BestOfSequence(Struct, frozen=True):
    """A sample that `best_of` did not choose."""

    generated_text: str
    finish_reason: str
    generated_tokens: int
    seed: int | None
    prefill: list[PrefillTokenOut]
    tokens: list[TokenOut]
    top_tokens: list[list[TokenOut]] | UnsetType = UNSET


class Details(Struct, frozen=True):
    """`details` of a whole answer."""

    finish_reason: str
    generated_tokens: int
    seed: int | None
    prefill: list[PrefillTokenOut]
    tokens: list[TokenOut]
    best_of_sequences: list[BestOfSequence] | UnsetType = UNSET
    top_tokens: list[list[TokenOut]] | UnsetType = UNSET


class GenerateResponse(Struct, frozen=True):
    """Answer of /generate."""

    generated_text: str
    details: Details | UnsetType = UNSET


class StreamDetails(Struct, frozen=True):
    """`details` of a stream's last event."""

    finish_reason: str
    generated_tokens: int
    seed: int | None
    input_length: int


class StreamResponse(Struct, frozen=True):
    """One event of /generate_stream."""

    index: int
    token: TokenOut
    top_tokens: list[TokenOut] | UnsetType = UNSET
    generated_text: str | None = None
    details: StreamDetails | None = None


class SimpleToken(Struct, frozen=True):
    """One token of /tokenize; offsets count bytes of the UTF-8 text."""

    id: int
    text: str
    start: int
    stop: int


class ChatTokenizeResponse(Struct, frozen=True):
    """Answer of /chat_tokenize."""

    tokenize_response: list[SimpleToken]
    templated_text: str


class Info(Struct, frozen=True):
    """Answer of /info: the fields of TGI 3, then those that only TGI 2 had."""

    model_id: str
    model_sha: str | None
    model_pipeline_tag: str | None
    max_concurrent_requests: int
    max_best_of: int
    max_stop_sequences: int
    max_input_tokens: int
    max_total_tokens: int
    validation_workers: int
    max_client_batch_size: int
    router: str
    version: str
    sha: str | None
    docker_label: str | None
    model_dtype: str
    model_device_type: str
    max_input_length: int
    waiting_served_ratio: float
    max_batch_total_tokens: int
    max_waiting_tokens: int
    max_batch_size: int | None
    kagami_version: str
    model_quantization: str | None
    """How the weights are kept: "int8", "int4", "gptq", …; null: not quantized."""


# --- OpenAI routes: requests ---


class StreamOptions(Struct, frozen=True):
    """`stream_options`."""

    include_usage: bool | None = None


class OpenAIRequest(Struct, frozen=True, kw_only=True):
    """What chat and completions have in common; null means absent."""

    model: str | None = None
    max_tokens: UInt32 | None = None
    max_completion_tokens: UInt32 | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Int32 | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    repetition_penalty: float | None = None
    stop: str | list[str | None] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    seed: UInt64 | None = None
    n: UInt32 | None = None
    logit_bias: dict[str, float] | list[float] | None = None
    """OpenAI's object; TGI's list of floats has no meaning there either and is ignored."""
    ignore_eos: bool | None = None


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


class ChatRequest(OpenAIRequest, frozen=True, kw_only=True):
    """Body of /v1/chat/completions and /chat_tokenize; messages go to the template as they are."""

    messages: list[dict[str, Any]]
    logprobs: bool | None = None
    top_logprobs: UInt32 | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    tool_prompt: str | None = None
    parallel_tool_calls: bool | None = None
    response_format: ResponseFormat | None = None
    documents: list[dict[str, Any]] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | str | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class CompletionRequest(OpenAIRequest, frozen=True, kw_only=True):
    """Body of /v1/completions; a prompt is a text or token ids, and there may be several."""

    prompt: str | list[str | int | list[Any]]
    suffix: str | None = None
    echo: bool | None = None
    best_of: UInt32 | None = None
    logprobs: bool | UInt32 | None = None
    """How many alternatives; true, which is a chat's way to ask, is 1."""


# --- OpenAI routes: answers ---


class PromptTokensDetails(Struct, frozen=True):
    """What is known of the prompt's tokens."""

    cached_tokens: int


class Usage(Struct, frozen=True):
    """Tokens spent."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


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


class ChatMessage(Struct, frozen=True):
    """The assistant's answer."""

    role: str
    content: str | None
    tool_calls: list[ToolCall] | UnsetType = UNSET


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


# --- errors ---


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


encode = msgspec.json.Encoder().encode


def shortest(logprob: float) -> float | None:
    """The 64-bit float that prints with the fewest digits that name this 32-bit value.

    `-0.34` for 0x1.5c28f6p-2, not `-0.3400000035762787`. 0.5 us for most logprobs. None for what is
    no number in JSON: infinities and NaN.
    """
    if not math.isfinite(logprob):
        return None
    mantissa, exponent = math.frexp(logprob)
    # Half the distance to the next 32-bit value: what is nearer is read as this one. Below a power
    # of two the values lie twice as dense.
    nearer = math.ldexp(1.0, exponent - (26 if mantissa in (0.5, -0.5) else 25))
    if -10 < logprob <= -0.1:
        # Whole numbers of up to 8 digits by a power of ten: both exact, so what is read is that.
        scale = 1e7 if logprob > -1 else 1e6
        for power in (scale, 10 * scale):
            rounded = round(logprob * power) / power
            if -nearer < rounded - logprob < nearer:
                return rounded
    for digits in ("%.7g", "%.8g"):
        rounded = float(digits % logprob)
        if -nearer < rounded - logprob < nearer:
            return rounded
    return float(f"{logprob:.9g}")
