"""Shows the progress: a live screen on a terminal, else one line for each run.

Drawing is done twice a second on the event loop; it is part of what the client says of its own
cost.
"""

import asyncio
import sys
import time
from bisect import bisect_left
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from typing import Protocol

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from kagami_benchmark import report
from kagami_benchmark.client import Outcome
from kagami_benchmark.figures import ResultRow
from kagami_benchmark.load import Run

REDRAW_S = 0.5
# Milliseconds; the last bar counts all longer ones.
EDGES = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000)
_BAR = 40


class View(Protocol):
    """Shows the progress of a measurement."""

    def watching(self, run: Run, title: str) -> AbstractAsyncContextManager[None]:
        """Show this run while it lasts."""

    def add(self, row: ResultRow) -> None:
        """Show the row of a workload that is done on one server."""


@contextmanager
def choose_view(*, is_plain: bool) -> Iterator[View]:
    """The live screen where stderr is a terminal: stdout is for the table."""
    console = Console(stderr=True)
    if is_plain or not console.is_terminal:
        yield PlainView()
        return
    with Live(console=console, auto_refresh=False, transient=True) as live:
        yield LiveView(live)


class PlainView:
    """Prints one line when a run is over."""

    @asynccontextmanager
    async def watching(self, run: Run, title: str) -> AsyncIterator[None]:
        yield
        failed = sum(bool(one.error) for one in run.outcomes)
        seconds = max(run.ended - run.started, 1e-9)
        tokens = sum(one.output_tokens for one in run.outcomes)
        sys.stderr.write(
            f"{title}: {tokens} tokens in {seconds:.2f} s, {tokens / seconds:.1f} tok/s"
            f"{f', {failed} failed' if failed else ''}\n"
        )

    def add(self, row: ResultRow) -> None:
        pass  # the table comes at the end


class Histogram:
    """Gaps between tokens by size; each call of `look` counts only the new ones."""

    def __init__(self) -> None:
        self.counts = [0] * (len(EDGES) + 1)
        self._seen: dict[Outcome, int] = {}

    def look(self, run: Run) -> None:
        """Count what is new in the run's outcomes."""
        for outcome in run.outcomes:
            start = max(1, self._seen.get(outcome, 1))
            end = len(outcome.arrivals)
            for index in range(start, end):
                gap = outcome.arrivals[index] - outcome.arrivals[index - 1]
                self.counts[bisect_left(EDGES, 1000 * gap)] += 1
            self._seen[outcome] = end

    def lines(self) -> Table:
        """One bar for each size."""
        table = Table.grid(padding=(0, 1))
        most = max(1, *self.counts)
        for edge, count in zip((*map(str, EDGES), "more"), self.counts, strict=True):
            bar = "█" * round(_BAR * count / most)
            table.add_row(f"{edge:>5} ms" if edge != "more" else "    more", bar, str(count or ""))
        return table


class LiveView:
    """The rows that are done, and the current run with its progress and its histogram."""

    def __init__(self, live: Live) -> None:
        self._live = live
        self._rows: list[ResultRow] = []

    @asynccontextmanager
    async def watching(self, run: Run, title: str) -> AsyncIterator[None]:
        histogram = Histogram()

        async def redraw() -> None:
            while True:
                self._draw(run, title, histogram)
                await asyncio.sleep(REDRAW_S)

        drawing = asyncio.ensure_future(redraw())  # ends with this context
        try:
            yield
        finally:
            drawing.cancel()
            self._draw(run, title, histogram)

    def add(self, row: ResultRow) -> None:
        self._rows.append(row)

    def _draw(self, run: Run, title: str, histogram: Histogram) -> None:
        histogram.look(run)
        now = run.ended or time.perf_counter()
        seconds = max(now - run.started, 1e-9) if run.started else 1e-9
        tokens = sum(len(one.arrivals) for one in run.outcomes)
        failed = sum(bool(one.error) for one in run.outcomes)
        state = Text(
            f"{run.num_ended} of {run.num_requests} answered, {failed} failed, {tokens} tokens,"
            f" {tokens / seconds:.0f} tok/s, {seconds:.0f} s"
        )
        bar = ProgressBar(total=run.num_requests, completed=run.num_ended, width=_BAR)
        panel = Panel(
            Group(state, bar, Text("time between tokens"), histogram.lines()), title=title
        )
        self._live.update(Group(_table(self._rows), panel), refresh=True)


def _table(rows: list[ResultRow]) -> Table:
    table = Table()
    for title in report.COLUMNS:
        table.add_column(title)
    for row in rows:
        table.add_row(*(cell(row) for cell in report.COLUMNS.values()))
    return table
