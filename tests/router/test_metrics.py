import pytest
from prometheus_client.parser import text_string_to_metric_families

from kagami_router.metrics import GenerationStats, Metrics, StepStats
from kagami_router.scheduler.step import PoolStats


def parsed(metrics: Metrics) -> dict[str, dict[str, float]]:
    """By name: samples by their labels."""
    found: dict[str, dict[str, float]] = {}
    for family in text_string_to_metric_families(metrics.render()):
        for sample in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sample.labels.items())
            # The parser puts behind every counter the suffix that this text has not.
            name = sample.name.removesuffix("_total") if family.type == "counter" else sample.name
            found.setdefault(name, {})[labels] = sample.value
    return found


def test_every_series_exists_before_the_first_request() -> None:
    found = parsed(Metrics())
    assert found["tgi_request_count"] == {"": 0}
    assert found["tgi_request_failure"]["err=overloaded"] == 0
    assert found["tgi_batch_inference_count"] == {"method=prefill": 0, "method=decode": 0}
    assert found["tgi_time_to_first_token_count"] == {"": 0}
    assert found["tgi_kv_blocks_total"] == {"": 0}


def test_counters_are_typed_and_have_no_suffix() -> None:
    text = Metrics().render()
    assert "# TYPE tgi_request_count counter\ntgi_request_count 0\n" in text
    assert "_total counter" not in text


def test_buckets_are_tgis() -> None:
    found = parsed(Metrics(max_input_tokens=1000, max_total_tokens=2000))
    durations = [label.removeprefix("le=") for label in found["tgi_request_duration_bucket"]]
    assert len(durations) == 36
    assert durations[0] == "0.00015000000000000001"
    assert next(iter(found["tgi_request_input_length_bucket"])) == "le=10"
    assert len(found["tgi_request_generated_tokens_bucket"]) == 101


def test_a_histogram_counts_at_and_below_its_bounds() -> None:
    metrics = Metrics(max_input_tokens=100, max_total_tokens=100)
    for length in (1, 2, 200):
        metrics.request_validated(length, 1)
    buckets = parsed(metrics)["tgi_request_input_length_bucket"]
    assert (buckets["le=1"], buckets["le=2"], buckets["le=100"]) == (1, 2, 2)
    assert buckets["le=+Inf"] == 3


def test_a_finished_generation_is_seen_everywhere() -> None:
    metrics = Metrics()
    metrics.generation_finished(GenerationStats(4.0, 0.5, 0.5, 3.0, 1.5, 6))
    found = parsed(metrics)
    assert found["tgi_request_duration_sum"] == {"": 4.0}
    assert found["tgi_request_validation_duration_sum"] == {"": 0.5}
    assert found["tgi_request_queue_duration_sum"] == {"": 0.5}
    assert found["tgi_request_inference_duration_sum"] == {"": 3.0}
    assert found["tgi_request_mean_time_per_token_duration_sum"] == {"": 0.5}
    assert found["tgi_time_to_first_token_sum"] == {"": 1.5}
    assert found["tgi_request_generated_tokens_sum"] == {"": 6}


def test_tokens_of_one_step_share_its_time() -> None:
    metrics = Metrics()
    metrics.tokens_arrived(0.3, 3)
    found = parsed(metrics)
    assert found["tgi_inter_token_latency_count"] == {"": 3}
    assert found["tgi_inter_token_latency_sum"][""] == pytest.approx(0.3)


@pytest.mark.parametrize(("prefill", "method"), [(5, "prefill"), (0, "decode")])
def test_steps_count_by_method(prefill: int, method: str) -> None:
    metrics = Metrics()
    metrics.step_finished(StepStats(prefill, 1, 1, 0.2, 0.05, failed=False))
    found = parsed(metrics)
    assert found["tgi_batch_inference_count"][f"method={method}"] == 1
    assert found["tgi_batch_inference_success"][f"method={method}"] == 1
    assert found["tgi_batch_inference_duration_sum"][f"method={method}"] == 0.2
    assert found["tgi_batch_forward_duration_sum"][f"method={method}"] == 0.05
    assert found["tgi_batch_next_size_count"] == {"": 1}


def test_a_failed_step_has_no_duration() -> None:
    metrics = Metrics()
    metrics.step_finished(StepStats(0, 1, 0, 0.2, 0.05, failed=True))
    found = parsed(metrics)
    assert found["tgi_batch_inference_failure"]["method=decode"] == 1
    assert found["tgi_batch_inference_duration_count"]["method=decode"] == 0


def test_the_pool_is_shown() -> None:
    metrics = Metrics()
    metrics.pool_changed(PoolStats(3, 2, 100, 40, 10, 640))
    metrics.preempted(2)
    metrics.prefix_looked_up(16, 20)
    found = parsed(metrics)
    assert found["tgi_queue_size"] == found["tgi_requests_waiting"] == {"": 2}
    assert found["tgi_batch_current_size"] == found["tgi_requests_running"] == {"": 3}
    assert found["tgi_batch_current_max_tokens"] == {"": 640}
    assert found["tgi_kv_blocks_used"] == {"": 40}
    assert found["tgi_preemptions"] == {"": 2}
    assert (found["tgi_prefix_hit_tokens"], found["tgi_prefix_prompt_tokens"]) == (
        {"": 16},
        {"": 20},
    )
