import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from tests.benchmark.test_report import ROW
from tests.benchmarks.side_by_side import processes, report
from tests.benchmarks.side_by_side.bars import Line, Measured
from tests.benchmarks.side_by_side.groups import of_present_limit, unequal
from tests.benchmarks.side_by_side.memory import PeakMemory
from tests.benchmarks.side_by_side.servers import NotStarted, Plan, running
from tests.integration.conftest import free_port

LINE = Line(
    what="W1",
    unit="out tok/s",
    weights="bf16",
    ours=82.3,
    others={"vllm-bf16": 47.4, "openvino-bf16": 61.0},
    against="openvino-bf16",
    ratio=1.349,
    bar="1.35 x the best",
    is_met=False,
)
CPUINFO = "processor : 0\nmodel name\t: A CPU: fast\nflags\t\t: fpu amx_tile sse\n"


def fake_process(proc: Path, pid: int, *, name: str, session: int, pss_kb: int = 0) -> None:
    folder = proc / str(pid)
    folder.mkdir()
    (folder / "stat").write_text(f"{pid} ({name}) S 1 {pid} {session} 0 -1\n")
    (folder / "statm").write_text("500 100 20 1 0 60 0\n")
    (folder / "smaps_rollup").write_text(
        f"0-1 ---p 0 00:00 0 [rollup]\nRss: 9 kB\nPss: {pss_kb} kB\n"
    )


def test_a_line_has_each_peer_in_its_makers_column() -> None:
    result = report.Result(report.conditions("m", 3, CPUINFO), [LINE], [], [])

    figures = "| W1, out tok/s | bf16 | 82.3 | 47.4 | 61.0 | - |"
    assert f"{figures} 1.35 x openvino-bf16 | 1.35 x the best | no |" in report.markdown(result)


def test_the_conditions_name_cpu_and_amx() -> None:
    text = report.conditions("m", 1, CPUINFO).text()

    assert "of A CPU: fast, with AMX" in text
    assert "medians of 1 round after" in text


def test_a_cpu_without_tiles_has_no_amx() -> None:
    assert not report.conditions("m", 1, "flags : fpu avx512f\n").has_amx


def test_markdown_has_notes_and_latencies() -> None:
    result = report.Result(
        report.conditions("m", 3, CPUINFO), [], ["a note"], [Measured("bf16", "ours", [ROW])]
    )

    text = report.markdown(result)

    assert "\n- a note\n" in text
    assert "| ours | W1: 1 client, 128 in, 128 out | 6/6 |" in text


def test_equal_work_is_not_worth_a_note() -> None:
    assert unequal([ROW]) == []


def test_other_counts_of_tokens_are_told() -> None:
    assert unequal([replace(ROW, output_tokens=384)]) == [
        "ours W1: 128 tokens in and 64 out, on average"
    ]


def test_requests_that_failed_are_told() -> None:
    failed = replace(ROW, num_succeeded=0)

    assert unequal([failed]) == ["ours W1: 0 of 6 requests succeeded"]


def test_the_share_is_of_what_the_memory_gives_now() -> None:
    row = of_present_limit(replace(ROW, bandwidth_share=0.5), 60e9, [30e9, 50e9])

    assert row.bandwidth_share == pytest.approx(0.75)


@pytest.mark.parametrize("limits", [[0.0, 50e9], [50e9, 0.0]])
def test_a_limit_that_was_not_measured_changes_no_share(limits: list[float]) -> None:
    row = replace(ROW, bandwidth_share=0.5)

    assert of_present_limit(row, 60e9, limits) == row


def test_processes_are_found_by_session_whatever_their_names(tmp_path: Path) -> None:
    fake_process(tmp_path, 7, name="server", session=7)
    fake_process(tmp_path, 8, name="a) S 1 1 (b", session=7)
    fake_process(tmp_path, 9, name="other", session=9)

    assert {key: sorted(pids) for key, pids in processes.sessions(tmp_path).items()} == {
        7: [7, 8],
        9: [9],
    }


def test_memory_is_summed_and_ended_processes_have_none(tmp_path: Path) -> None:
    fake_process(tmp_path, 7, name="a", session=7, pss_kb=3)
    fake_process(tmp_path, 8, name="b", session=7, pss_kb=4)

    assert processes.proportional_bytes([7, 8, 99], tmp_path) == 7 * 1024
    assert processes.resident_bytes([7, 8, 99], tmp_path) == 200 * os.sysconf("SC_PAGE_SIZE")


def test_a_session_is_ended_with_all_that_it_started() -> None:
    leader = subprocess.Popen(
        ["sh", "-c", "sleep 60 & echo $!; exec sleep 60"],
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    assert leader.stdout is not None
    child = int(leader.stdout.readline())
    assert child in processes.sessions()[leader.pid]

    processes.send(signal.SIGKILL, {leader.pid})

    assert leader.wait(timeout=5) < 0
    leader.stdout.read()  # ends when the child, too, has let go of the pipe
    leader.stdout.close()


def test_sessions_stand_still_and_go_on() -> None:
    still, going = (subprocess.Popen(["sleep", "60"], start_new_session=True) for _ in range(2))
    try:
        with processes.stopped({still.pid}):
            assert os.waitid(os.P_PID, still.pid, os.WSTOPPED) is not None
            assert os.waitid(os.P_PID, going.pid, os.WSTOPPED | os.WNOHANG) is None
        assert os.waitid(os.P_PID, still.pid, os.WCONTINUED) is not None
    finally:
        for one in (still, going):
            one.kill()
            one.wait()


def test_a_server_that_ends_at_once_shows_its_last_lines(tmp_path: Path) -> None:
    command = [sys.executable, "-Sc", "raise SystemExit('no such model')"]
    plan = Plan("peer", command, {}, free_port(), limit_s=10)

    with pytest.raises(NotStarted, match="no such model"), PeakMemory() as memory:
        with running(plan, tmp_path, memory):
            pass


def is_running(part: str) -> bool:
    """Whether a process has this in its command line."""
    found = subprocess.run(
        ["ps", "-eww", "-o", "args="], capture_output=True, text=True, check=True
    )
    return part in found.stdout


def test_a_server_that_never_answers_is_given_up_and_ended(tmp_path: Path) -> None:
    command = [sys.executable, "-Sc", "import time; time.sleep(60)", str(tmp_path)]
    plan = Plan("peer", command, dict(os.environ), free_port(), limit_s=0.1)

    with pytest.raises(NotStarted, match="peer: no answer within"), PeakMemory() as memory:
        with running(plan, tmp_path, memory):
            pass

    assert not is_running(str(tmp_path))
