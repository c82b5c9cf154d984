"""What was measured against what was asked for. Pure: data in, lines of the table out."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from kagami_benchmark.figures import ResultRow
from kagami_benchmark.workload import NAMED

OURS = "Kagami"
START, MEMORY = "start to first answer", "peak memory"
SHARE = "W1 share of the memory's limit"
SMALL, LARGE = "smol135m", "llama1b"


@dataclass(frozen=True, slots=True)
class Measured:
    """All figures of one weights' group; what was not measured is absent."""

    weights: str
    ours: str
    """Our server's name in `rows`, `starts` and `peaks`."""
    rows: Sequence[ResultRow] = ()
    starts: Mapping[str, float] = field(default_factory=dict)
    """Seconds by server."""
    peaks: Mapping[str, int] = field(default_factory=dict)
    """Bytes by server."""


@dataclass(frozen=True, slots=True)
class Bar:
    """What a figure has to reach, by model.

    With `against`, a limit is the least ratio of our figure to the best of those servers. Without,
    it is a least figure, or a greatest one where `is_ceiling`.
    """

    limits: Mapping[str, float]
    against: tuple[str, ...] = ()
    is_ceiling: bool = False


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the table."""

    what: str
    unit: str
    weights: str
    ours: float
    others: Mapping[str, float]
    """The other servers' figures, by name."""
    against: str = ""
    """The server that the ratio is to: the best of those that count."""
    ratio: float | None = None
    """How many times as good as that one; of times and bytes, theirs / ours."""
    bar: str = ""
    is_met: bool | None = None
    """None where there is no bar, or nobody to measure by."""


_BF16 = ("vllm-bf16", "openvino-bf16")
# By (what, weights), as they were set for two cores with AMX.
BARS: Mapping[tuple[str, str], Bar] = {
    ("W1", "bf16"): Bar({SMALL: 1.35, LARGE: 1.15}, _BF16),
    (SHARE, "bf16"): Bar({SMALL: 0.75, LARGE: 0.85}),
    ("W2", "bf16"): Bar({SMALL: 1.4, LARGE: 1.2}, _BF16),
    ("W3", "bf16"): Bar({SMALL: 1.5, LARGE: 1.3}, ("vllm-bf16",)),
    ("W4", "bf16"): Bar({SMALL: 1.3, LARGE: 1.2}, ("vllm-bf16",)),
    ("W1", "8bit"): Bar({SMALL: 1.5, LARGE: 1.2}, ("llamacpp-q8_0",)),
    ("W2", "8bit"): Bar({SMALL: 1.15, LARGE: 1.15}, ("vllm-w8a8",)),
    ("W3", "8bit"): Bar({SMALL: 1.15, LARGE: 1.15}, ("vllm-w8a8",)),
    ("W4", "8bit"): Bar({SMALL: 1.15, LARGE: 1.15}, ("vllm-w8a8",)),
    ("W1", "4bit"): Bar({SMALL: 1.0, LARGE: 1.0}, ("llamacpp-q4_0",)),
    (MEMORY, "bf16"): Bar({SMALL: 1.0, LARGE: 3.2}, is_ceiling=True),
    (START, "bf16"): Bar({SMALL: 4.0, LARGE: 7.0}, is_ceiling=True),
}

# What a workload is judged by: where nearly all tokens are the prompts', they count too.
_RATES: Mapping[str, tuple[str, Callable[[ResultRow], float]]] = {
    name: ("total tok/s", lambda row: row.total_rate)
    if name == "W4"
    else ("out tok/s", lambda row: row.output_rate)
    for name in NAMED
}


def lines(measured: Sequence[Measured], model: str) -> list[Line]:
    """The whole table: rates by weights, then memory and start."""
    found: list[Line | None] = [line for group in measured for line in _rates(group, model)]
    for group in measured:
        gigabytes = {name: peak / 1e9 for name, peak in group.peaks.items()}
        found.append(_line(MEMORY, "GB", group, gigabytes, model))
    found += [_line(START, "s", group, group.starts, model) for group in measured]
    return [line for line in found if line is not None]


def _rates(group: Measured, model: str) -> list[Line | None]:
    found = []
    for workload, (unit, value) in _RATES.items():
        rows = [row for row in group.rows if row.workload.name == workload and row.num_succeeded]
        values = {row.target: value(row) for row in rows}
        found.append(_line(workload, unit, group, values, model))
        if workload == "W1":
            shares = {row.target: row.bandwidth_share for row in rows if row.bandwidth_share}
            found.append(_line(SHARE, "", group, shares, model))
    return found


def _line(
    what: str, unit: str, group: Measured, values: Mapping[str, float], model: str
) -> Line | None:
    """None where our own figure is missing."""
    if (ours := values.get(group.ours)) is None:
        return None
    others = {name: value for name, value in values.items() if name != group.ours}
    bar = BARS.get((what, group.weights))
    is_less_better = unit in ("s", "GB")
    named = [name for name in (bar.against if bar else ()) or others if name in others]
    pick = min if is_less_better else max
    best = pick(named, key=others.__getitem__, default="")
    ratio = (others[best] / ours if is_less_better else ours / others[best]) if best else None
    limit = bar.limits.get(model) if bar else None
    if bar is None or limit is None:
        return Line(what, unit, group.weights, ours, others, best, ratio)
    judged = ratio if bar.against else ours
    is_met = None
    if judged is not None:
        is_met = judged < limit if bar.is_ceiling else judged >= limit
    text = _bar_text(bar, limit, unit)
    return Line(what, unit, group.weights, ours, others, best, ratio, text, is_met)


def _bar_text(bar: Bar, limit: float, unit: str) -> str:
    if bar.is_ceiling:
        return f"under {limit:g} {unit}"
    if not bar.against:
        return f"{limit:g}"
    best = "the best of " if len(bar.against) > 1 else ""
    return f"{limit:g} x {best}{', '.join(bar.against)}"
