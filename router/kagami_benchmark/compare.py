"""Two files of results side by side: how many times as fast the second is."""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec

from kagami_benchmark.cli import Compare
from kagami_benchmark.figures import ResultRow
from kagami_benchmark.report import Report, table

# Ratios are second / first for rates and first / second for times: above 1 the second is better.
_RATES: Mapping[str, Callable[[ResultRow], float]] = {
    "out tok/s": lambda row: row.output_rate,
    "total tok/s": lambda row: row.total_rate,
}
_TIMES: Mapping[str, Callable[[ResultRow], float]] = {
    "first token p50": lambda row: row.first_token.p50,
    "first token p99": lambda row: row.first_token.p99,
    "inter-token p50": lambda row: row.inter_token.p50,
    "inter-token p99": lambda row: row.inter_token.p99,
    "end to end p50": lambda row: row.end_to_end.p50,
}
_Key = tuple[str, ...]


def compare(args: Compare) -> int:
    """Print the ratios; the exit code."""
    try:
        before, after = (_load(path) for path in (args.before, args.after))
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    pairs = pair(before.rows, after.rows)
    if not pairs:
        sys.stderr.write("error: --compare: the two files have no workload in common\n")
        return 1
    sys.stdout.write("\n".join(ratios(pairs)) + "\n")
    sys.stdout.write(f"\nAbove 1: {args.after} is better than {args.before}.\n")
    return 0


def _load(path: Path) -> Report:
    try:
        return msgspec.json.decode(path.read_bytes(), type=Report)
    except OSError as error:
        raise ValueError(f"--compare: {path}: {error.strerror}") from error
    except msgspec.MsgspecError as error:
        raise ValueError(f"--compare: {path} holds no results: {error}") from error


def pair(before: list[ResultRow], after: list[ResultRow]) -> list[tuple[ResultRow, ResultRow]]:
    """Rows of one workload; the server's name counts where a file has several."""
    by_name = len({row.target for row in before}) > 1 or len({row.target for row in after}) > 1
    old = {_key(row, by_name): row for row in before}
    return [(old[key], row) for row in after if (key := _key(row, by_name)) in old]


def _key(row: ResultRow, by_name: bool) -> _Key:
    key = (row.workload.name, row.workload.describe())
    return (*key, row.target) if by_name else key


def ratios(pairs: list[tuple[ResultRow, ResultRow]]) -> list[str]:
    """The lines of a Markdown table."""
    cells = [["server", "workload", *_RATES, *_TIMES]]
    for old, new in pairs:
        row = [new.target, f"{new.workload.name}: {new.workload.describe()}"]
        row += [_ratio(value(old), value(new)) for value in _RATES.values()]
        row += [_ratio(value(new), value(old)) for value in _TIMES.values()]
        cells.append(row)
    return table(cells)


def _ratio(low: float, high: float) -> str:
    return f"{high / low:.2f}" if low > 0 and high > 0 else "-"
