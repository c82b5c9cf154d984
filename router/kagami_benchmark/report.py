"""Rows as a table: the one on the screen, Markdown, and JSON."""

import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import msgspec

from kagami_benchmark.figures import ResultRow, Spread


@dataclass(frozen=True, slots=True)
class Report:
    """What --json writes and --compare reads."""

    tool: str
    created: str
    """UTC, ISO 8601."""
    machine: str
    """Version of this client."""
    rows: list[ResultRow]


def machine() -> str:
    """The machine this runs on, in a few words."""
    return f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}"


def tool() -> str:
    """Name and version of this program."""
    return f"text-generation-benchmark {version('kagami-tgi')}"


def _three(spread: Spread) -> str:
    digits = 1 if spread.p50 < 100 else 0
    return " / ".join(f"{each:.{digits}f}" for each in (spread.p50, spread.p90, spread.p99))


def _rate(row: ResultRow) -> str:
    text = f"{row.output_rate:.1f}"
    if row.num_runs == 1:
        return text
    return f"{text} ({row.output_rate_low:.0f}-{row.output_rate_high:.0f})"


def _share(row: ResultRow) -> str:
    return "-" if row.bandwidth_share is None else f"{100 * row.bandwidth_share:.0f} %"


COLUMNS: Mapping[str, Callable[[ResultRow], str]] = {
    "server": lambda row: row.target,
    "workload": lambda row: f"{row.workload.name}: {row.workload.describe()}",
    "ok": lambda row: f"{row.num_succeeded}/{row.num_requests}",
    "out tok/s": _rate,
    "total tok/s": lambda row: f"{row.total_rate:.0f}",
    "first token ms": lambda row: _three(row.first_token),
    "inter-token ms": lambda row: _three(row.inter_token),
    "end to end ms": lambda row: _three(row.end_to_end),
    "bandwidth": _share,
}
LEGEND = "Latencies: p50 / p90 / p99. Rates: median of the runs (lowest-highest)."


def markdown(rows: Sequence[ResultRow]) -> str:
    """The table in Markdown, and the remarks under it."""
    lines = table([[*COLUMNS], *([cell(row) for cell in COLUMNS.values()] for row in rows)])
    return "\n".join([*lines, "", *notes(rows)]) + "\n"


def table(cells: Sequence[Sequence[str]]) -> list[str]:
    """Markdown's lines; the first row is the head."""
    head, *body = [f"| {' | '.join(row)} |" for row in cells]
    return [head, "|" + "---|" * len(cells[0]), *body]


def notes(rows: Sequence[ResultRow]) -> list[str]:
    """The remarks under the table: the client's own cost, and every error."""
    if not rows:
        return ["Nothing was measured."]
    tokens = max(1, sum(row.output_tokens for row in rows))
    cost = sum(row.client_us_per_token * row.output_tokens for row in rows) / tokens
    most = max(row.client_cores for row in rows)
    lines = [LEGEND, f"Client: {cost:.1f} µs of CPU a token, at most {most:.2f} of a core."]
    for row in rows:
        place = f"{row.target} {row.workload.name}"
        lines += [f"{place}: {count} x {text}" for text, count in row.errors.items()]
        if text := _length_note(row):
            lines.append(f"{place}: {text}")
    return lines


def _length_note(row: ResultRow) -> str:
    """The mean prompt length, if it is off by more than a template's few tokens; else empty."""
    wanted = row.workload
    low, high = (wanted.prefix_tokens + each for each in (wanted.prompt.low, wanted.prompt.high))
    if not row.num_succeeded or not row.prompt_tokens:
        return ""
    mean = row.prompt_tokens / row.num_succeeded
    if 0.9 * low - 1 <= mean <= 1.1 * high + 1:
        return ""
    return f"prompts had {mean:.0f} tokens on average"


def write(report: Report, *, json_path: Path | None, markdown_path: Path | None) -> None:
    """Write the files that were asked for; raises `OSError`."""
    if json_path is not None:
        json_path.write_bytes(msgspec.json.format(msgspec.json.encode(report)) + b"\n")
    if markdown_path is not None:
        title = f"{report.tool}, {report.created}, {report.machine}\n\n"
        markdown_path.write_text(title + markdown(report.rows), encoding="utf-8")
