"""The names of every span, attribute and event that Kagami exports, each with what it means.

`deploy/tracing.md` explains them in tables that a test keeps in step with these enums. `gen_ai.*`,
`http.*`, `server.*`, `url.*`, `error.type` and `user_agent.original` are OpenTelemetry's semantic
conventions, version 1.44.0; what they have no name for begins with `kagami.`. Times that are
attributes are milliseconds, as numbers, and say so in their names.
"""

import enum

SEMCONV_VERSION = "1.44.0"
SCHEMA_URL = f"https://opentelemetry.io/schemas/{SEMCONV_VERSION}"


class SpanName(enum.StrEnum):
    """Spans with a fixed name; the root of a request is called `METHOD route`."""

    # One request, in the router.
    TEMPLATE = "template"
    VALIDATE = "validate"
    QUEUE = "queue"
    PREFILL = "prefill"
    DECODE = "decode"
    # The same request, in every shard.
    SHARD_PREFILL = "shard.prefill"
    SHARD_DECODE = "shard.decode"
    # One forward pass, a trace of its own (--otlp-step-spans).
    SHARD_STEP = "shard.step"
    # The start of the server.
    START = "start"
    DOWNLOAD = "download"
    CONVERT = "convert"
    START_SHARDS = "start shards"
    START_ROUTER = "start router"
    SHARD_LOAD = "shard.load"
    SHARD_WARMUP = "shard.warmup"
    ROUTER_START = "router.start"
    ROUTER_LOAD_TOKENIZER = "router.load_tokenizer"
    ROUTER_CONNECT = "router.connect"
    ROUTER_WARMUP = "router.warmup"


class Key(enum.StrEnum):
    """Attributes of spans, events and links."""

    # Semantic conventions: HTTP.
    HTTP_METHOD = "http.request.method"
    HTTP_ROUTE = "http.route"
    HTTP_STATUS = "http.response.status_code"
    URL_PATH = "url.path"
    URL_SCHEME = "url.scheme"
    SERVER_ADDRESS = "server.address"
    SERVER_PORT = "server.port"
    CLIENT_ADDRESS = "client.address"
    USER_AGENT = "user_agent.original"
    ERROR_TYPE = "error.type"
    # Semantic conventions: generative AI.
    OPERATION = "gen_ai.operation.name"
    PROVIDER = "gen_ai.provider.name"
    OUTPUT_TYPE = "gen_ai.output.type"
    REQUEST_MODEL = "gen_ai.request.model"
    REQUEST_STREAM = "gen_ai.request.stream"
    MAX_TOKENS = "gen_ai.request.max_tokens"
    CHOICE_COUNT = "gen_ai.request.choice.count"
    TEMPERATURE = "gen_ai.request.temperature"
    TOP_P = "gen_ai.request.top_p"
    TOP_K = "gen_ai.request.top_k"
    FREQUENCY_PENALTY = "gen_ai.request.frequency_penalty"
    PRESENCE_PENALTY = "gen_ai.request.presence_penalty"
    SEED = "gen_ai.request.seed"
    RESPONSE_MODEL = "gen_ai.response.model"
    RESPONSE_ID = "gen_ai.response.id"
    FINISH_REASONS = "gen_ai.response.finish_reasons"
    TIME_TO_FIRST_CHUNK = "gen_ai.response.time_to_first_chunk"
    INPUT_TOKENS = "gen_ai.usage.input_tokens"
    OUTPUT_TOKENS = "gen_ai.usage.output_tokens"
    CACHED_INPUT_TOKENS = "gen_ai.usage.cache_read.input_tokens"
    # Text, with --otlp-include-content only.
    STOP_SEQUENCES = "gen_ai.request.stop_sequences"
    INPUT_MESSAGES = "gen_ai.input.messages"
    OUTPUT_MESSAGES = "gen_ai.output.messages"
    # Our own.
    REQUEST_ID = "kagami.request.id"
    SEQUENCE_ID = "kagami.sequence.id"
    PROMPT_TOKENS = "kagami.prompt.tokens"
    CACHED_TOKENS = "kagami.prompt.cached_tokens"
    GRAMMAR_MS = "kagami.grammar.compile_ms"
    WAIT_REASON = "kagami.queue.reason"
    QUEUE_AHEAD = "kagami.queue.ahead"
    IS_REPLAY = "kagami.prefill.is_replay"
    TOKENS = "kagami.tokens"
    STEPS = "kagami.steps"
    STEP_NUMBER = "kagami.step.number"
    STEP_PREFILL_TOKENS = "kagami.step.prefill_tokens"
    STEP_SEQUENCES = "kagami.step.sequences"
    STEP_MS = "kagami.step.ms"
    MEAN_STEP_MS = "kagami.step.mean_ms"
    MAX_STEP_MS = "kagami.step.max_ms"
    MEAN_SEQUENCES = "kagami.step.mean_sequences"
    POSITION = "kagami.chunk.position"
    HOST_MS = "kagami.host_ms"
    DEVICE_MS = "kagami.device_ms"
    BETWEEN_STEPS_MS = "kagami.between_steps_ms"
    RANK = "kagami.rank"
    WORLD_SIZE = "kagami.world_size"
    MODEL_ID = "kagami.model.id"
    KV_BLOCKS = "kagami.kv.blocks"


class EventName(enum.StrEnum):
    """Events on spans."""

    WAITING = "waiting"
    CHUNK = "chunk"
    FIRST_TOKEN = "first_token"
    SLOWEST_STEP = "slowest_step"
    PREEMPTED = "preempted"
    CANCELLED = "cancelled"
    STEP_FAILED = "step_failed"
