from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from kagami_benchmark import report
from kagami_benchmark.cli import Compare
from kagami_benchmark.compare import compare
from kagami_benchmark.figures import ResultRow, Spread
from kagami_benchmark.workload import NAMED

TEN = Spread(4, 10.0, 10.0, 20.0, 30.0)
ROW = ResultRow(
    target="ours",
    url="http://h/generate_stream",
    model="m",
    workload=NAMED["W1"],
    num_runs=3,
    num_requests=6,
    num_succeeded=6,
    errors={},
    prompt_tokens=768,
    output_tokens=768,
    output_rate=100.0,
    output_rate_low=90.0,
    output_rate_high=110.0,
    total_rate=200.0,
    request_rate=1.0,
    first_token=TEN,
    inter_token=TEN,
    end_to_end=TEN,
    client_us_per_token=25.0,
    client_cores=0.02,
    bandwidth_share=0.75,
)


def saved(path: Path, *rows: ResultRow) -> Path:
    report.write(report.Report("t", "2026", "m", [*rows]), json_path=path, markdown_path=None)
    return path


def test_the_table_says_rates_latencies_and_the_share_of_the_bandwidth() -> None:
    line = report.markdown([ROW]).splitlines()[2]

    assert line == (
        "| ours | W1: 1 client, 128 in, 128 out | 6/6 | 100.0 (90-110) | 200"
        " | 10.0 / 20.0 / 30.0 | 10.0 / 20.0 / 30.0 | 10.0 / 20.0 / 30.0 | 75 % |"
    )


def test_the_clients_cost_stands_under_the_table() -> None:
    assert "Client: 25.0 µs of CPU a token, at most 0.02 of a core." in report.markdown([ROW])


def test_errors_stand_under_the_table() -> None:
    text = report.markdown([replace(ROW, errors={"429 no room": 2})])

    assert "ours W1: 2 x 429 no room\n" in text


def test_prompts_of_another_length_are_told() -> None:
    assert "prompts had 200 tokens" in report.markdown([replace(ROW, prompt_tokens=1200)])
    assert "prompts had" not in report.markdown([ROW])


def test_the_json_is_read_back(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.json", ROW)

    assert msgspec.json.decode(path.read_bytes(), type=report.Report).rows == [ROW]


def test_the_markdown_file_has_the_table(tmp_path: Path) -> None:
    whole = report.Report("tool 1", "2026", "machine", [ROW])

    report.write(whole, json_path=None, markdown_path=tmp_path / "a.md")

    assert (tmp_path / "a.md").read_text().startswith("tool 1, 2026, machine\n\n| server |")


def test_ratios_above_one_are_better(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    faster = replace(ROW, output_rate=150.0, first_token=Spread(4, 5.0, 5.0, 10.0, 60.0))

    code = compare(Compare(saved(tmp_path / "a", ROW), saved(tmp_path / "b", faster)))

    said = capsys.readouterr().out.splitlines()[2]
    assert code == 0
    assert said == (
        "| ours | W1: 1 client, 128 in, 128 out | 1.50 | 1.00 | 2.00 | 0.50 | 1.00 | 1.00 | 1.00 |"
    )


def test_servers_of_other_names_are_compared_where_each_file_has_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = saved(tmp_path / "b", replace(ROW, target="theirs"))

    assert compare(Compare(saved(tmp_path / "a", ROW), other)) == 0
    assert "| theirs | W1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (None, "No such file or directory"),
        (b"{", "holds no results"),
        (b'{"tool":"","created":"","machine":"","rows":[]}', "have no workload in common"),
    ],
)
def test_what_cannot_be_compared_gets_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes | None, line: str
) -> None:
    if content is not None:
        (tmp_path / "b").write_bytes(content)

    assert compare(Compare(saved(tmp_path / "a", ROW), tmp_path / "b")) == 1
    said = capsys.readouterr().err
    assert line in said
    assert said.count("\n") == 1
