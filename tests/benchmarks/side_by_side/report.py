"""The lines as a table on the terminal, as Markdown and as JSON, with what is to be known."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table
from tests.benchmarks.side_by_side.bars import OURS, Line, Measured
from tests.benchmarks.side_by_side.peers import MAKERS, PEERS

from kagami_benchmark import report as latencies

_WIDTH = 150
_MET = {True: "yes", False: "no", None: "-"}


@dataclass(frozen=True, slots=True)
class Conditions:
    """Under which all of it was measured."""

    date: str
    cpu: str
    num_cores: int
    has_amx: bool
    model: str
    rounds: int

    def text(self) -> str:
        """One paragraph."""
        amx = "with AMX" if self.has_amx else "without AMX"
        rounds = f"{self.rounds} round{'s' if self.rounds > 1 else ''}"
        return (
            f"{self.model} on {self.num_cores} cores of {self.cpu}, {amx}, {self.date}."
            " Servers of one kind of weights were up together and measured in turn; medians of"
            f" {rounds} after one that does not count. Greedy, EOS ignored, over loopback, the"
            " client on the same cores. Start: from exec to the first completion (ours: the median"
            " of as many starts as rounds). Memory: peak PSS of all processes."
        )


@dataclass(frozen=True, slots=True)
class Result:
    """What --json writes."""

    conditions: Conditions
    lines: Sequence[Line]
    notes: Sequence[str]
    groups: Sequence[Measured]


def conditions(model: str, rounds: int, cpuinfo: str) -> Conditions:
    """The conditions on this machine now; `cpuinfo` is the text of /proc/cpuinfo."""
    fields = {}
    for line in cpuinfo.splitlines():
        name, _, value = line.partition(":")
        fields[name.strip()] = value.strip()
    return Conditions(
        date=datetime.now(UTC).date().isoformat(),
        cpu=fields.get("model name", "an unknown CPU"),
        num_cores=len(os.sched_getaffinity(0)),
        has_amx="amx_tile" in fields.get("flags", "").split(),
        model=model,
        rounds=rounds,
    )


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.2f}" if value < 10 else f"{value:.1f}"


def _of(maker: str) -> Callable[[Line], str]:
    def cell(line: Line) -> str:
        values = [value for name, value in line.others.items() if PEERS[name].maker == maker]
        return ", ".join(map(_number, values)) or "-"

    return cell


def _ratio(line: Line) -> str:
    return "-" if line.ratio is None else f"{line.ratio:.2f} x {line.against}"


COLUMNS: Mapping[str, Callable[[Line], str]] = {
    "measured": lambda line: f"{line.what}, {line.unit}" if line.unit else line.what,
    "weights": lambda line: line.weights,
    OURS: lambda line: _number(line.ours),
    **{maker: _of(maker) for maker in MAKERS},
    "as good as": _ratio,
    "bar": lambda line: line.bar or "-",
    "met": lambda line: _MET[line.is_met],
}


def markdown(result: Result) -> str:
    """The table, its conditions, and the table of latencies."""
    cells = [[*COLUMNS], *([cell(line) for cell in COLUMNS.values()] for line in result.lines)]
    parts = [result.conditions.text(), "", *latencies.table(cells), ""]
    parts += [f"- {note}" for note in result.notes]
    rows = [row for group in result.groups for row in group.rows]
    return "\n".join(parts) + "\n\n" + latencies.markdown(rows)


def show(result: Result) -> None:
    """On the terminal; where there is none, as wide as it is."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=_WIDTH)
    table = Table()
    for title in COLUMNS:
        table.add_column(title)
    for line in result.lines:
        table.add_row(*(cell(line) for cell in COLUMNS.values()))
    console.print(table)
    console.print(result.conditions.text(), highlight=False)
    for note in result.notes:
        console.print(f"- {note}", highlight=False, markup=False)


def write(result: Result, *, json_path: Path | None, markdown_path: Path | None) -> None:
    """The files that were asked for; raises `OSError`."""
    if json_path is not None:
        json_path.write_bytes(msgspec.json.format(msgspec.json.encode(result)) + b"\n")
    if markdown_path is not None:
        markdown_path.write_text(markdown(result), encoding="utf-8")
