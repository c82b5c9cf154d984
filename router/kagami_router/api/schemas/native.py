"""The JSON of TGI's own routes: requests as its clients send them, answers as they expect them.

Types, defaults and key order; the rules are in validation.py. Nothing behind `api/` sees these
structs. Unknown fields are ignored, as TGI does.
"""

from typing import Any, Literal

from msgspec import UNSET, Struct, UnsetType

from kagami_router.api.schemas.encoding import Int32, UInt32, UInt64

# --- requests ---


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
    min_p: float | None = None
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
    """Body of /generate and /generate_stream; without `parameters` TGI samples."""

    inputs: str
    parameters: GenerateParameters | UnsetType = UNSET


class TokenizeRequest(Struct, frozen=True):
    """Body of /tokenize: TGI's form has `inputs`, vLLM's has `prompt`."""

    inputs: str | UnsetType = UNSET
    prompt: str | UnsetType = UNSET
    add_special_tokens: bool = True
    return_token_strs: bool = False


class DetokenizeRequest(Struct, frozen=True):
    """Body of /detokenize, as in vLLM."""

    tokens: list[int]


class CompatGenerateRequest(Struct, frozen=True):
    """Body of `/`."""

    inputs: str
    parameters: GenerateParameters | UnsetType = UNSET
    stream: bool = False


# --- answers ---


class TokensAnswer(Struct, frozen=True):
    """Answer of /tokenize in vLLM's form."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class TextAnswer(Struct, frozen=True):
    """Answer of /detokenize."""

    prompt: str


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
    """How the weights are stored: "int8", "int4", "gptq", …; null: not quantized."""
