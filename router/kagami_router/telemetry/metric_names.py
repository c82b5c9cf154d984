"""Every metric by name, with its help, labels and buckets; nothing here knows when one changes.

TGI's names, labels and buckets stay where TGI has the metric. Ours are named as Prometheus asks:
counters end in `_total`, units stand in the name. `deploy/metrics.md` lists them all, and a test
keeps it so. Every series exists from the start, with the value 0.
"""

from kagami_router.scheduler.step import JoinReason
from kagami_router.telemetry.series import Registry

# Seconds, 0.15 ms to 145 s (TGI's: 0.0001 * 1.5^k).
DURATIONS = tuple(0.0001 * 1.5**k for k in range(1, 36))
# TGI has one bucket for each size from 1 to 1024: a thousand lines in every scrape.
BATCH_SIZES = tuple(float(2**k) for k in range(11))
# A step of decodes alone fills little of the token budget.
RATIOS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, *(k / 10 for k in range(1, 11)))
# TGI's: 0 to the number of tokens speculated.
SKIPPED = (0.0,)
METHODS = ("prefill", "decode")
KINDS = ("prefill", "decode", "mixed")
JOIN_REASONS = tuple(reason.value for reason in JoinReason)
SOURCES = ("computed", "cached", "recomputed")
FAILURES = (
    "overloaded",
    "validation",
    "generation",
    "incomplete",
    "dropped",
    "template",
    "unavailable",
)
FIRST_RANK = "0"


class RequestSeries:
    """What calls and their generations change."""

    def __init__(self, new: Registry) -> None:
        self.count = new.counter("tgi_request_count", "Total number of requests")
        self.success = new.counter("tgi_request_success", "Number of successful requests")
        self.failure = new.counters(
            "tgi_request_failure", "Number of failed requests by cause", "err", FAILURES
        )
        self.duration = new.histogram(
            "tgi_request_duration", "Request duration in seconds", DURATIONS
        )
        self.validation_duration = new.histogram(
            "tgi_request_validation_duration", "Request validation duration in seconds", DURATIONS
        )
        self.queue_duration = new.histogram(
            "tgi_request_queue_duration", "Request queue duration in seconds", DURATIONS
        )
        self.inference_duration = new.histogram(
            "tgi_request_inference_duration", "Request inference duration in seconds", DURATIONS
        )
        self.time_per_token = new.histogram(
            "tgi_request_mean_time_per_token_duration",
            "Mean time per token per request in seconds, prefill included",
            DURATIONS,
        )
        # The bounds of lengths are hundredths of the limits, which the warm-up finds.
        self.generated_tokens = new.histogram(
            "tgi_request_generated_tokens", "Generated tokens per request", ()
        )
        self.input_length = new.histogram(
            "tgi_request_input_length", "Input token length per request", ()
        )
        self.max_new_tokens = new.histogram(
            "tgi_request_max_new_tokens", "Maximum new tokens per request", ()
        )
        self.skipped_tokens = new.histogram(
            "tgi_request_skipped_tokens",
            "Speculated tokens accepted per request and step (0 without speculation)",
            SKIPPED,
        )
        self.first_token = new.histogram(
            "tgi_time_to_first_token_seconds",
            "Time from the arrival of a request to its first token",
            DURATIONS,
        )
        self.inter_token = new.histogram(
            "tgi_inter_token_latency_seconds",
            "Time between two tokens of one request; tokens that arrive together share it",
            DURATIONS,
        )


class BatchSeries:
    """What steps change."""

    def __init__(self, new: Registry) -> None:
        self.next_size = new.histogram(
            "tgi_batch_next_size", "Sequences that joined the batch in one step", BATCH_SIZES
        )
        self.concat = new.counters(
            "tgi_batch_concat",
            "Steps in which sequences joined a running batch, by what let them in",
            "reason",
            JOIN_REASONS,
        )
        self.count = new.counters(
            "tgi_batch_inference_count",
            "Inference calls per method (prefill or decode)",
            "method",
            METHODS,
        )
        self.success = new.counters(
            "tgi_batch_inference_success",
            "Number of successful inference calls per method (prefill or decode)",
            "method",
            METHODS,
        )
        self.failure = new.counters(
            "tgi_batch_inference_failure",
            "Number of failed inference calls per method (prefill or decode)",
            "method",
            METHODS,
        )
        self.duration = new.histograms(
            "tgi_batch_inference_duration",
            "Duration in seconds of one step as the router sees it",
            "method",
            METHODS,
            DURATIONS,
        )
        self.forward_duration = new.histograms(
            "tgi_batch_forward_duration",
            "Duration in seconds of the forward pass on the slowest shard's device",
            "method",
            METHODS,
            DURATIONS,
        )
        self.decode_duration = new.histograms(
            "tgi_batch_decode_duration",
            "Duration in seconds of sampling on the slowest shard and of making text of the tokens",
            "method",
            METHODS,
            DURATIONS,
        )
        self.filter_duration = new.histograms(
            "tgi_batch_filter_duration",
            "Duration in seconds of sorting a step's results and sending them to their requests",
            "method",
            METHODS,
            DURATIONS,
        )
        self.concat_duration = new.histograms(
            "tgi_batch_concat_duration",
            "Duration in seconds of taking newcomers into the batch on the slowest shard",
            "method",
            METHODS,
            DURATIONS,
        )
        self.step_duration = new.histograms(
            "tgi_step_duration_seconds",
            "Duration of one step by what it computes: prompts, next tokens, or both",
            "kind",
            KINDS,
            DURATIONS,
        )
        self.token_fill = new.histogram(
            "tgi_batch_fill_tokens_ratio", "Tokens in one step / token budget of a step", RATIOS
        )
        self.sequence_fill = new.histogram(
            "tgi_batch_fill_sequences_ratio", "Sequences in one step / max batch size", RATIOS
        )
        self.prompt_tokens = new.counters(
            "tgi_prompt_tokens_total",
            "Prompt tokens by where their KV came from: computed, found in the prefix cache, or"
            " computed again after a preemption or a failed step (with the output until then)",
            "source",
            SOURCES,
        )
        self.prefix_hits = new.counter(
            "tgi_prefix_hit_tokens_total",
            "Tokens found in the prefix cache, also by sequences that come again",
        )
        self.prefix_lookups = new.counter(
            "tgi_prefix_lookup_tokens_total", "Tokens looked up in the prefix cache"
        )
        self.generated_tokens = new.counter(
            "tgi_generated_tokens_total", "Tokens given to requests, finished or not"
        )
        self.preemptions = new.counter(
            "tgi_preemptions_total", "Sequences that lost their KV blocks and are computed again"
        )
        self.read_bytes = new.counter(
            "tgi_decode_read_bytes_total",
            "Bytes of weights and KV cache that steps of decodes alone had to read, on one shard",
        )
        self.bandwidth = new.gauge(
            "tgi_memory_bandwidth_bytes_per_second",
            "Read bandwidth of the slowest shard's memory, measured at warm-up",
        )
        self.bandwidth_share = new.gauge(
            "tgi_memory_bandwidth_used_ratio",
            "Bytes read / device time / measured bandwidth over the last steps of decodes alone",
        )


class StateSeries:
    """What a scrape finds."""

    def __init__(self, new: Registry) -> None:
        self.queue_size = new.gauge("tgi_queue_size", "Current queue size")
        self.batch_size = new.gauge("tgi_batch_current_size", "Current batch size")
        self.batch_tokens = new.gauge(
            "tgi_batch_current_max_tokens", "Tokens that the current batch holds in the KV cache"
        )
        self.max_total_tokens = new.gauge(
            "tgi_batch_max_total_tokens", "Tokens that fit into the KV cache"
        )
        self.running = new.gauge("tgi_requests_running", "Sequences in the batch")
        self.waiting = new.gauge("tgi_requests_waiting", "Sequences waiting for the batch")
        self.blocks = new.gauge("tgi_kv_blocks_capacity", "KV blocks in the pool")
        self.blocks_used = new.gauge("tgi_kv_blocks_used", "KV blocks held by sequences")
        self.blocks_cached = new.gauge(
            "tgi_kv_blocks_cached", "KV blocks in the prefix cache alone"
        )
        self.shard_up = new.gauges(
            "tgi_shard_up",
            "1 while the shard answers and its step stream stands",
            "rank",
            (FIRST_RANK,),
        )
        self.shard_restarts = new.counters(
            "tgi_shard_restarts_total",
            "Shards that came back under a running router (today a lost shard ends the server)",
            "rank",
            (FIRST_RANK,),
        )
        self.spans_dropped = new.counter(
            "tgi_trace_spans_dropped_total",
            "Spans that router and shards could not give to the trace collector",
        )
