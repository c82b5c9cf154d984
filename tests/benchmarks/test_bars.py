from collections.abc import Mapping, Sequence
from dataclasses import replace

import pytest
from tests.benchmark.test_report import ROW
from tests.benchmarks.side_by_side.bars import LARGE, MEMORY, SMALL, START, Line, Measured, lines

from kagami_benchmark.figures import ResultRow
from kagami_benchmark.workload import NAMED

OURS = "kagami"


def rows(workload: str = "W1", **rates: float) -> list[ResultRow]:
    """Total rates are ten times the output's."""
    return [
        replace(
            ROW,
            target=name.replace("_", "-"),
            workload=NAMED[workload],
            output_rate=rate,
            total_rate=10 * rate,
            bandwidth_share=None,
        )
        for name, rate in rates.items()
    ]


def line_of(measured: Sequence[ResultRow], weights: str = "bf16", model: str = SMALL) -> Line:
    (line,) = lines([Measured(weights, OURS, measured)], model)
    return line


def limited(
    *, starts: Mapping[str, float] | None = None, peaks: Mapping[str, int] | None = None
) -> Line:
    (line,) = lines([Measured("bf16", OURS, (), starts or {}, peaks or {})], SMALL)
    return line


def test_the_ratio_is_to_the_best_peer_that_counts() -> None:
    line = line_of(rows(kagami=100, vllm_bf16=40, openvino_bf16=80))

    assert (line.against, line.ratio) == ("openvino-bf16", 1.25)


def test_a_bar_that_names_its_peer_is_not_about_a_better_one() -> None:
    line = line_of(rows("W3", kagami=100, vllm_bf16=50, openvino_bf16=90))

    assert (line.against, line.ratio, line.is_met) == ("vllm-bf16", 2.0, True)


@pytest.mark.parametrize(("theirs", "is_met"), [(100, True), (100.1, False)])
def test_a_floor_is_met_from_its_value_on(theirs: float, is_met: bool) -> None:
    assert line_of(rows(kagami=135, vllm_bf16=theirs)).is_met is is_met


def test_the_larger_model_has_floors_of_its_own() -> None:
    measured = rows(kagami=120, vllm_bf16=100)

    assert not line_of(measured, model=SMALL).is_met
    assert line_of(measured, model=LARGE).is_met


def test_a_model_without_bars_has_ratios_only() -> None:
    line = line_of(rows(kagami=120, vllm_bf16=100), model="another")

    assert (line.ratio, line.bar, line.is_met) == (1.2, "", None)


def test_alone_there_is_a_bar_and_no_verdict() -> None:
    line = line_of(rows(kagami=120))

    assert line.bar == "1.35 x the best of vllm-bf16, openvino-bf16"
    assert (line.ratio, line.is_met) == (None, None)


def test_the_named_peers_absence_gives_no_verdict() -> None:
    line = line_of(rows("W3", kagami=120, openvino_bf16=100))

    assert (line.against, line.ratio, line.is_met) == ("", None, None)


def test_prefill_is_judged_by_all_tokens() -> None:
    line = line_of(rows("W4", kagami=13, vllm_bf16=10))

    assert (line.unit, line.ours, line.is_met) == ("total tok/s", 130, True)


def test_a_server_whose_requests_all_failed_does_not_count() -> None:
    failed = [replace(row, num_succeeded=0) for row in rows(vllm_bf16=1)]

    assert line_of([*rows(kagami=100), *failed]).others == {}


def test_without_our_own_figure_there_is_no_line() -> None:
    assert lines([Measured("bf16", OURS, rows(vllm_bf16=1))], SMALL) == []


@pytest.mark.parametrize(("share", "is_met"), [(0.75, True), (0.74, False)])
def test_the_share_of_the_memorys_limit_is_a_floor_itself(share: float, is_met: bool) -> None:
    row = replace(ROW, target=OURS, bandwidth_share=share)

    line = lines([Measured("bf16", OURS, [row])], SMALL)[1]

    assert (line.ours, line.bar, line.is_met) == (share, "0.75", is_met)


def test_only_the_single_client_has_a_share_of_the_memorys_limit() -> None:
    row = replace(ROW, target=OURS, workload=NAMED["W2"])

    assert [line.what for line in lines([Measured("bf16", OURS, [row])], SMALL)] == ["W2"]


@pytest.mark.parametrize(("seconds", "is_met"), [(3.9, True), (4.0, False)])
def test_a_start_has_to_stay_under_its_limit(seconds: float, is_met: bool) -> None:
    line = limited(starts={OURS: seconds})

    assert (line.what, line.bar, line.is_met) == (START, "under 4 s", is_met)


def test_of_memory_less_is_better() -> None:
    line = limited(peaks={OURS: 500_000_000, "vllm-bf16": 4_000_000_000, "openvino-bf16": 10**9})

    assert (line.what, line.ours, line.against, line.ratio) == (MEMORY, 0.5, "openvino-bf16", 2.0)


def test_rates_come_first_then_memory_then_starts() -> None:
    def group(weights: str) -> Measured:
        return Measured(weights, OURS, rows(kagami=1), {OURS: 1.0}, {OURS: 1})

    found = lines([group("bf16"), group("8bit")], SMALL)

    assert [line.what for line in found] == ["W1", "W1", MEMORY, MEMORY, START, START]
