import re
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from kagami_proto.values import SamplingParams, Wanted
from kagami_router.request.prompt import Prompt
from kagami_router.request.token_log import TokenLog
from kagami_router.request.values import StoppingParams, ValidRequest
from kagami_router.scheduler.prefix_cache import PrefixKey
from kagami_router.scheduler.sequence import Sequence
from kagami_router.scheduler.step import (
    JoinReason,
    NewSequence,
    PoolStats,
    Step,
    StepResults,
    WorkItem,
)
from kagami_router.telemetry.metrics import Capacity, GenerationStats, Metrics, StepReport

TABLE = Path(__file__).parents[3] / "deploy" / "metrics.md"
# Names, types and labels of TGI 3.3; the histogram of skipped tokens is that of TGI 2.0.
TGI = {
    "tgi_request_count": ("counter", ""),
    "tgi_request_success": ("counter", ""),
    "tgi_request_failure": ("counter", "err"),
    "tgi_request_duration": ("histogram", ""),
    "tgi_request_validation_duration": ("histogram", ""),
    "tgi_request_queue_duration": ("histogram", ""),
    "tgi_request_inference_duration": ("histogram", ""),
    "tgi_request_mean_time_per_token_duration": ("histogram", ""),
    "tgi_request_generated_tokens": ("histogram", ""),
    "tgi_request_input_length": ("histogram", ""),
    "tgi_request_max_new_tokens": ("histogram", ""),
    "tgi_request_skipped_tokens": ("histogram", ""),
    "tgi_queue_size": ("gauge", ""),
    "tgi_batch_next_size": ("histogram", ""),
    "tgi_batch_current_size": ("gauge", ""),
    "tgi_batch_current_max_tokens": ("gauge", ""),
    "tgi_batch_concat": ("counter", "reason"),
    "tgi_batch_concat_duration": ("histogram", "method"),
    "tgi_batch_inference_count": ("counter", "method"),
    "tgi_batch_inference_success": ("counter", "method"),
    "tgi_batch_inference_failure": ("counter", "method"),
    "tgi_batch_inference_duration": ("histogram", "method"),
    "tgi_batch_forward_duration": ("histogram", "method"),
    "tgi_batch_decode_duration": ("histogram", "method"),
    "tgi_batch_filter_duration": ("histogram", "method"),
    "tgi_batch_max_total_tokens": ("gauge", ""),
}
CAPACITY = Capacity(
    max_input_tokens=1000,
    max_total_tokens=2000,
    pool_tokens=3200,
    max_step_tokens=100,
    max_batch_size=8,
    weight_bytes=1_000_000,
    kv_token_bytes=1000,
    bandwidth=1e9,
)
POOL = PoolStats(3, 2, 100, 40, 10, 640)
REPORT = StepReport(wall_s=0.25, update_s=0.5, text_s=1.0, delivery_s=2.0, num_tokens=3)
RESULTS = StepResults(1, device_ns=50_000_000, sampling_ns=10_000_000, admission_ns=5_000_000)
REQUEST = ValidRequest(Prompt((1, 2, 3, 4, 5), ""), SamplingParams(), StoppingParams(8))
NEW = NewSequence(1, [1, 2, 3, 4, 5], 5, REQUEST, False, 4, is_replay=False, looked_up=True)
SEQUENCE = Sequence(1, REQUEST, TokenLog([1]), PrefixKey([1]), 9, added_at=0.0)
WORK = WorkItem(SEQUENCE, 4, 1, [], Wanted.ONE_TOKEN)
DECODES = Step(
    number=1,
    new_sequences=[],
    drop_ids=[],
    work=[WORK, WORK],
    num_decodes=2,
    num_prefill_tokens=0,
    num_answers=2,
    preempted=[],
    num_kv_tokens=10,
)
PREFILL = DECODES._replace(new_sequences=[NEW], num_decodes=0, num_prefill_tokens=2)
MIXED = PREFILL._replace(num_decodes=1, join_reason=JoinReason.CHUNKING)


def warm() -> Metrics:
    metrics = Metrics()
    metrics.model_ready(CAPACITY, lambda: POOL)
    return metrics


def parsed(metrics: Metrics) -> dict[str, dict[str, float]]:
    """By name: samples by their labels."""
    found: dict[str, dict[str, float]] = {}
    for line in metrics.render().splitlines():
        if not line.startswith("#"):
            name, labels, value = re.fullmatch(r"(\w+)(?:\{(.*)\})? (\S+)", line).groups()  # type: ignore[union-attr]
            found.setdefault(name, {})[(labels or "").replace('"', "")] = float(value)
    return found


def families(text: str) -> dict[str, tuple[str, str, str]]:
    """By name: type, labels, help."""
    found = {}
    for family in text_string_to_metric_families(text):
        # The parser takes from a counter the suffix that the text has.
        name = next(
            one for one in (f"{family.name}_total", family.name) if f"# TYPE {one} " in text
        )
        labels = sorted({label for one in family.samples for label in one.labels} - {"le"})
        found[name] = (family.type, ", ".join(labels), family.documentation)
    return found


@pytest.mark.parametrize("name", TGI)
def test_every_metric_of_tgi_is_there_before_the_model_is(name: str) -> None:
    assert families(Metrics().render())[name][:2] == TGI[name]


def test_every_metric_has_a_sample_before_the_first_request() -> None:
    text = Metrics().render()
    assert all(family.samples for family in text_string_to_metric_families(text))
    assert 'tgi_request_failure{err="overloaded"} 0\n' in text
    assert 'tgi_shard_up{rank="0"} 0\n' in text


def test_the_table_of_metrics_is_the_codes() -> None:
    row = r"^\| `(tgi_\w+)` \| (\w+) \| (.*?) \| (.*) \|$"
    rows = re.findall(row, TABLE.read_text(), re.MULTILINE)
    listed = {name: (kind, labels.strip("`"), text) for name, kind, labels, text in rows}
    assert len(rows) == len(listed), "a metric is listed twice"
    assert listed == families(Metrics().render())


def test_buckets_are_tgis() -> None:
    found = parsed(warm())
    durations = [label.removeprefix("le=") for label in found["tgi_request_duration_bucket"]]
    assert len(durations) == 36
    assert durations[0] == "0.00015000000000000001"
    assert next(iter(found["tgi_request_input_length_bucket"])) == "le=10"
    assert next(iter(found["tgi_request_max_new_tokens_bucket"])) == "le=20"
    assert len(found["tgi_request_generated_tokens_bucket"]) == 101


def test_before_the_limits_are_known_lengths_have_no_buckets_that_would_go() -> None:
    assert parsed(Metrics())["tgi_request_input_length_bucket"] == {"le=+Inf": 0}


def test_a_finished_generation_is_seen_everywhere() -> None:
    metrics = warm()
    metrics.generation_finished(GenerationStats(4.0, 0.5, 0.5, 3.0, 6))
    found = parsed(metrics)
    assert found["tgi_request_duration_sum"] == {"": 4.0}
    assert found["tgi_request_validation_duration_sum"] == {"": 0.5}
    assert found["tgi_request_queue_duration_sum"] == {"": 0.5}
    assert found["tgi_request_inference_duration_sum"] == {"": 3.0}
    assert found["tgi_request_mean_time_per_token_duration_sum"] == {"": 0.5}
    assert found["tgi_request_generated_tokens_sum"] == {"": 6}


def test_tokens_of_one_step_share_its_time() -> None:
    metrics = Metrics()
    metrics.first_token_arrived(1.5)
    metrics.tokens_arrived(0.3, 3)
    found = parsed(metrics)
    assert found["tgi_time_to_first_token_seconds_sum"] == {"": 1.5}
    assert found["tgi_inter_token_latency_seconds_count"] == {"": 3}
    assert found["tgi_inter_token_latency_seconds_sum"][""] == pytest.approx(0.3)


def test_what_is_counted_many_at_once_counts_once() -> None:
    metrics = warm()
    for _ in range(1_100):
        metrics.tokens_arrived(0.1, 1)
    for _ in range(40):
        metrics.step_finished(DECODES, RESULTS, REPORT)
    parsed(metrics)
    metrics.tokens_arrived(0.1, 1)
    metrics.step_finished(DECODES, RESULTS, REPORT)
    for _ in range(2):
        found = parsed(metrics)
        assert found["tgi_inter_token_latency_seconds_count"] == {"": 1_101}
        assert found["tgi_batch_inference_count"]["method=decode"] == 41


@pytest.mark.parametrize(
    ("step", "method", "kind"),
    [
        (PREFILL, "prefill", "prefill"),
        (MIXED, "prefill", "mixed"),
        (DECODES, "decode", "decode"),
    ],
)
def test_steps_count_by_method_and_kind(step: Step, method: str, kind: str) -> None:
    metrics = warm()
    metrics.step_finished(step, RESULTS, REPORT)
    found = parsed(metrics)
    assert found["tgi_batch_inference_count"][f"method={method}"] == 1
    assert found["tgi_batch_inference_success"][f"method={method}"] == 1
    assert found["tgi_batch_inference_duration_sum"][f"method={method}"] == 0.25
    assert found["tgi_step_duration_seconds_sum"] == {
        f"kind={one}": 0.25 if one == kind else 0 for one in ("prefill", "decode", "mixed")
    }


def test_a_steps_time_is_told_part_by_part() -> None:
    metrics = warm()
    metrics.step_finished(PREFILL, RESULTS, REPORT)
    found = parsed(metrics)
    label = "method=prefill"
    assert found["tgi_batch_forward_duration_sum"][label] == pytest.approx(0.04)
    assert found["tgi_batch_decode_duration_sum"][label] == pytest.approx(1.01)
    assert found["tgi_batch_filter_duration_sum"][label] == 2.5
    assert found["tgi_batch_concat_duration_sum"][label] == 0.005


def test_a_failed_step_has_no_duration() -> None:
    metrics = warm()
    metrics.step_finished(DECODES, RESULTS._replace(error="no"), REPORT)
    found = parsed(metrics)
    assert found["tgi_batch_inference_failure"]["method=decode"] == 1
    assert found["tgi_batch_inference_duration_count"]["method=decode"] == 0
    assert found["tgi_generated_tokens_total"] == {"": 0}


def test_a_step_tells_who_joined_and_who_left() -> None:
    metrics = warm()
    metrics.step_sent(MIXED._replace(preempted=[None] * 2))
    metrics.step_sent(PREFILL)
    metrics.step_sent(DECODES)
    found = parsed(metrics)
    assert found["tgi_batch_next_size_count"] == {"": 2}
    assert found["tgi_batch_concat"]["reason=chunking"] == 1
    assert found["tgi_preemptions_total"] == {"": 2}


def test_prompt_tokens_are_told_by_source() -> None:
    metrics = warm()
    replay = NEW._replace(is_replay=True, num_cached_tokens=2)
    alone = NEW._replace(looked_up=False, num_cached_tokens=0)
    metrics.step_sent(PREFILL._replace(new_sequences=[NEW, replay, alone]))
    found = parsed(metrics)
    assert found["tgi_prompt_tokens_total"] == {
        "source=computed": 1 + 5,
        "source=cached": 4,
        "source=recomputed": 3,
    }
    assert found["tgi_prefix_hit_tokens_total"] == {"": 6}
    assert found["tgi_prefix_lookup_tokens_total"] == {"": 10}


def test_tokens_are_counted_once_each_and_skip_none() -> None:
    metrics = warm()
    metrics.step_finished(DECODES, RESULTS, REPORT)
    found = parsed(metrics)
    assert found["tgi_generated_tokens_total"] == {"": 3}
    assert found["tgi_request_skipped_tokens_bucket"] == {"le=0": 3, "le=+Inf": 3}


def test_a_steps_fill_is_its_share_of_the_budgets() -> None:
    metrics = warm()
    metrics.step_finished(DECODES, RESULTS, REPORT)
    found = parsed(metrics)
    assert found["tgi_batch_fill_tokens_ratio_sum"] == {"": 0.02}
    assert found["tgi_batch_fill_sequences_ratio_sum"] == {"": 0.25}


def test_the_share_of_the_bandwidth_is_what_decodes_read_in_their_time() -> None:
    metrics = warm()
    metrics.step_finished(PREFILL, RESULTS, REPORT)
    metrics.step_finished(DECODES, RESULTS, REPORT)
    metrics.step_finished(DECODES, RESULTS, REPORT)
    found = parsed(metrics)
    assert found["tgi_decode_read_bytes_total"] == {"": 2 * (1_000_000 + 10 * 1000)}
    assert found["tgi_memory_bandwidth_bytes_per_second"] == {"": 1e9}
    assert found["tgi_memory_bandwidth_used_ratio"][""] == pytest.approx(1.01e6 / 0.05 / 1e9)


def test_a_bandwidth_that_was_not_measured_has_no_share() -> None:
    metrics = Metrics()
    metrics.model_ready(replace(CAPACITY, bandwidth=0.0), lambda: POOL)
    metrics.step_finished(DECODES, RESULTS, REPORT)
    assert parsed(metrics)["tgi_memory_bandwidth_used_ratio"] == {"": 0}


def test_a_scrape_asks_for_queue_and_pool() -> None:
    found = parsed(warm())
    assert found["tgi_queue_size"] == found["tgi_requests_waiting"] == {"": 2}
    assert found["tgi_batch_current_size"] == found["tgi_requests_running"] == {"": 3}
    assert found["tgi_batch_current_max_tokens"] == {"": 640}
    assert found["tgi_batch_max_total_tokens"] == {"": 3200}
    assert found["tgi_kv_blocks_capacity"] == {"": 100}
    assert found["tgi_kv_blocks_used"] == {"": 40}
    assert found["tgi_kv_blocks_cached"] == {"": 10}


def test_every_rank_has_its_shards_state() -> None:
    metrics = Metrics()
    metrics.watch_shards(lambda: [True, False])
    metrics.shard_restarted(1)
    found = parsed(metrics)
    assert found["tgi_shard_up"] == {"rank=0": 1, "rank=1": 0}
    assert found["tgi_shard_restarts_total"] == {"rank=0": 0, "rank=1": 1}


def test_dropped_spans_are_counted() -> None:
    metrics = Metrics()
    metrics.watch_spans(lambda: 3)
    assert parsed(metrics)["tgi_trace_spans_dropped_total"] == {"": 3}
