"""The names of every span, attribute and event that Kagami exports.

`deploy/tracing.md` explains them in tables that a test keeps in step with this file. `gen_ai.*`,
`http.*`, `server.*`, `url.*`, `error.type` and `user_agent.original` are OpenTelemetry's semantic
conventions, version 1.44.0; what they have no name for begins with `kagami.`. Times that are
attributes are milliseconds, as numbers, and say so in their names. `OtherServersKey` is what
dashboards made for other servers read.

Plain strings and no enums: an enum's hash is a call of Python code, and each of these becomes the
key of a dictionary once a step or a span.
"""

from typing import Final

SEMCONV_VERSION = "1.44.0"
SCHEMA_URL = f"https://opentelemetry.io/schemas/{SEMCONV_VERSION}"


class SpanName:
    """Spans with a fixed name; the root of a request is called `METHOD route`."""

    # One request, in the router.
    TEMPLATE: Final = "template"
    VALIDATE: Final = "validate"
    QUEUE: Final = "queue"
    PREFILL: Final = "prefill"
    DECODE: Final = "decode"
    # The same request, in every shard.
    SHARD_PREFILL: Final = "shard.prefill"
    SHARD_DECODE: Final = "shard.decode"
    # One forward pass, a trace of its own (--otlp-step-spans).
    SHARD_STEP: Final = "shard.step"
    # The start of the server.
    START: Final = "start"
    DOWNLOAD: Final = "download"
    CONVERT: Final = "convert"
    START_SHARDS: Final = "start shards"
    START_ROUTER: Final = "start router"
    SHARD_LOAD: Final = "shard.load"
    SHARD_WARMUP: Final = "shard.warmup"
    ROUTER_START: Final = "router.start"
    ROUTER_LOAD_TOKENIZER: Final = "router.load_tokenizer"
    ROUTER_CONNECT: Final = "router.connect"
    ROUTER_WARMUP: Final = "router.warmup"


class Key:
    """Attributes of spans, events and links."""

    # Semantic conventions: HTTP.
    HTTP_METHOD: Final = "http.request.method"
    HTTP_ROUTE: Final = "http.route"
    HTTP_STATUS: Final = "http.response.status_code"
    URL_PATH: Final = "url.path"
    URL_SCHEME: Final = "url.scheme"
    SERVER_ADDRESS: Final = "server.address"
    SERVER_PORT: Final = "server.port"
    CLIENT_ADDRESS: Final = "client.address"
    USER_AGENT: Final = "user_agent.original"
    ERROR_TYPE: Final = "error.type"
    # Semantic conventions: generative AI.
    OPERATION: Final = "gen_ai.operation.name"
    PROVIDER: Final = "gen_ai.provider.name"
    OUTPUT_TYPE: Final = "gen_ai.output.type"
    REQUEST_MODEL: Final = "gen_ai.request.model"
    REQUEST_STREAM: Final = "gen_ai.request.stream"
    MAX_TOKENS: Final = "gen_ai.request.max_tokens"
    CHOICE_COUNT: Final = "gen_ai.request.choice.count"
    TEMPERATURE: Final = "gen_ai.request.temperature"
    TOP_P: Final = "gen_ai.request.top_p"
    TOP_K: Final = "gen_ai.request.top_k"
    FREQUENCY_PENALTY: Final = "gen_ai.request.frequency_penalty"
    PRESENCE_PENALTY: Final = "gen_ai.request.presence_penalty"
    SEED: Final = "gen_ai.request.seed"
    RESPONSE_MODEL: Final = "gen_ai.response.model"
    RESPONSE_ID: Final = "gen_ai.response.id"
    FINISH_REASONS: Final = "gen_ai.response.finish_reasons"
    TIME_TO_FIRST_CHUNK: Final = "gen_ai.response.time_to_first_chunk"
    INPUT_TOKENS: Final = "gen_ai.usage.input_tokens"
    OUTPUT_TOKENS: Final = "gen_ai.usage.output_tokens"
    CACHED_INPUT_TOKENS: Final = "gen_ai.usage.cache_read.input_tokens"
    # Text, with --otlp-include-content only.
    STOP_SEQUENCES: Final = "gen_ai.request.stop_sequences"
    INPUT_MESSAGES: Final = "gen_ai.input.messages"
    OUTPUT_MESSAGES: Final = "gen_ai.output.messages"
    # Our own.
    REQUEST_ID: Final = "kagami.request.id"
    SEQUENCE_ID: Final = "kagami.sequence.id"
    PROMPT_TOKENS: Final = "kagami.prompt.tokens"
    CACHED_TOKENS: Final = "kagami.prompt.cached_tokens"
    GRAMMAR_MS: Final = "kagami.grammar.compile_ms"
    WAIT_REASON: Final = "kagami.queue.reason"
    QUEUE_AHEAD: Final = "kagami.queue.ahead"
    IS_REPLAY: Final = "kagami.prefill.is_replay"
    TOKENS: Final = "kagami.tokens"
    STEPS: Final = "kagami.steps"
    STEP_NUMBER: Final = "kagami.step.number"
    STEP_PREFILL_TOKENS: Final = "kagami.step.prefill_tokens"
    STEP_SEQUENCES: Final = "kagami.step.sequences"
    STEP_MS: Final = "kagami.step.ms"
    MEAN_STEP_MS: Final = "kagami.step.mean_ms"
    MAX_STEP_MS: Final = "kagami.step.max_ms"
    MEAN_SEQUENCES: Final = "kagami.step.mean_sequences"
    POSITION: Final = "kagami.chunk.position"
    HOST_MS: Final = "kagami.host_ms"
    DEVICE_MS: Final = "kagami.device_ms"
    BETWEEN_STEPS_MS: Final = "kagami.between_steps_ms"
    RANK: Final = "kagami.rank"
    WORLD_SIZE: Final = "kagami.world_size"
    MODEL_ID: Final = "kagami.model.id"
    KV_BLOCKS: Final = "kagami.kv.blocks"


class OtherServersKey:
    """Attributes of a request's span in the names and forms of other inference servers."""

    # TGI 3: texts, as Rust prints them.
    TOTAL_TIME: Final = "total_time"
    VALIDATION_TIME: Final = "validation_time"
    QUEUE_TIME: Final = "queue_time"
    INFERENCE_TIME: Final = "inference_time"
    TIME_PER_TOKEN: Final = "time_per_token"
    SEED: Final = "seed"
    # vLLM and SGLang: seconds, as numbers.
    LATENCY_QUEUE: Final = "gen_ai.latency.time_in_queue"
    LATENCY_FIRST_TOKEN: Final = "gen_ai.latency.time_to_first_token"
    LATENCY_TOTAL: Final = "gen_ai.latency.e2e"
    LATENCY_PREFILL: Final = "gen_ai.latency.time_in_model_prefill"
    LATENCY_DECODE: Final = "gen_ai.latency.time_in_model_decode"
    LATENCY_INFERENCE: Final = "gen_ai.latency.time_in_model_inference"


class EventName:
    """Events on spans."""

    WAITING: Final = "waiting"
    CHUNK: Final = "chunk"
    FIRST_TOKEN: Final = "first_token"
    SLOWEST_STEP: Final = "slowest_step"
    PREEMPTED: Final = "preempted"
    CANCELLED: Final = "cancelled"
    STEP_FAILED: Final = "step_failed"
