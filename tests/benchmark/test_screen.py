import io
from array import array

from rich.console import Console
from rich.live import Live
from tests.benchmark.test_report import ROW

from kagami_benchmark.client import Outcome
from kagami_benchmark.load import Run
from kagami_benchmark.screen import EDGES, Histogram, LiveView, choose_view


def run() -> Run:
    arrivals = array("d", [1.0, 1.003, 1.006, 1.5])
    return Run(2, [Outcome(0.5, arrivals, ended=1.5)], started=0.5, ended=1.5)


def test_gaps_are_counted_by_size_and_each_once() -> None:
    histogram, one = Histogram(), run()

    histogram.look(one)
    one.outcomes[0].arrivals.append(100.0)
    histogram.look(one)

    counts = dict(zip((*EDGES, "more"), histogram.counts, strict=True))
    assert {edge: count for edge, count in counts.items() if count} == {5: 2, 500: 1, "more": 1}


async def test_the_live_screen_shows_rows_progress_and_histogram() -> None:
    screen = io.StringIO()
    environ = {"TERM": "xterm"}  # a dumb terminal has 80 columns, whatever is asked for
    console = Console(file=screen, force_terminal=True, width=160, _environ=environ)
    with Live(console=console, auto_refresh=False) as live:
        view = LiveView(live)
        view.add(ROW)
        async with view.watching(run(), "ours  W2  (run 1 of 3)"):
            pass

    text = screen.getvalue()
    for part in ("100.0 (90-110)", "run 1 of 3", "1 of 2 answered, 0 failed, 4 tokens", "█"):
        assert part in text


async def test_without_a_terminal_a_run_is_one_line(capsys) -> None:
    with choose_view(is_plain=True) as view:
        async with view.watching(run(), "ours  W2"):
            pass

    assert capsys.readouterr().err == "ours  W2: 0 tokens in 1.00 s, 0.0 tok/s\n"
