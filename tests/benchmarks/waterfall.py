"""Draws exported spans as a waterfall: SVG, one row a span, time from left to right."""

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

_WIDTH, _LABEL, _ROW, _TOP = 1000, 250, 22, 34
_COLOURS = {
    "queue": "#d9822b",
    "prefill": "#2965cc",
    "decode": "#29a634",
    "shard.prefill": "#7fa7e8",
    "shard.decode": "#8bd493",
}
_ROOT, _EVENT = "#5c7080", "#c23030"


def draw(title: str, spans: Sequence[Mapping[str, Any]]) -> str:
    """The spans as SVG, each under its parent; times are nanoseconds since 1970."""
    start = min(span["start"] for span in spans)
    length = max(span["end"] for span in spans) - start
    scale = (_WIDTH - _LABEL - 90) / length
    rows = _in_order(spans)
    height = _TOP + _ROW * len(rows) + 30
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}"'
        ' font-family="sans-serif" font-size="12">',
        f'<rect width="{_WIDTH}" height="{height}" fill="white"/>',
        f'<text x="8" y="20" font-size="14" font-weight="bold">{escape(title)}</text>',
    ]
    for index, (depth, span) in enumerate(rows):
        y = _TOP + _ROW * index
        x = _LABEL + (span["start"] - start) * scale
        width = max(1.5, (span["end"] - span["start"]) * scale)
        milliseconds = (span["end"] - span["start"]) / 1e6
        colour = _COLOURS.get(span["name"], _ROOT)
        reason = span["attributes"].get("kagami.queue.reason")
        note = f"{milliseconds:,.1f} ms" + (f", {reason}" if reason else "")
        parts += [
            f'<text x="{8 + 14 * depth}" y="{y + 14}">{escape(span["name"])}</text>',
            f'<rect x="{x:.1f}" y="{y + 3}" width="{width:.1f}" height="14" rx="2"'
            f' fill="{colour}"/>',
            _note(note, x, width, y),
        ]
        for event in span["events"]:
            at = _LABEL + (event["time"] - start) * scale
            parts.append(
                f'<path d="M{at:.1f} {y + 1}v18" stroke="{_EVENT}" stroke-width="1.5">'
                f"<title>{escape(event['name'])}</title></path>"
            )
    parts += [_axis(length, scale, height), "</svg>"]
    return "\n".join(parts) + "\n"


def _note(note: str, x: float, width: float, y: int) -> str:
    """Beside the bar where there is room, else before it."""
    if x + width + 150 < _WIDTH:
        return f'<text x="{x + width + 5:.1f}" y="{y + 14}" fill="#5c7080">{escape(note)}</text>'
    return (
        f'<text x="{x + width - 5:.1f}" y="{y + 14}" fill="white" text-anchor="end">'
        f"{escape(note)}</text>"
    )


def _axis(length: int, scale: float, height: int) -> str:
    y = height - 12
    ticks = [
        f'<text x="{_LABEL + length * share * scale:.0f}" y="{y}" fill="#5c7080"'
        f' text-anchor="middle">{length * share / 1e6:,.0f} ms</text>'
        for share in (0, 0.25, 0.5, 0.75, 1)
    ]
    return "\n".join(ticks)


def _in_order(spans: Sequence[Mapping[str, Any]]) -> list[tuple[int, Mapping[str, Any]]]:
    """Depth first, children by their start."""
    known = {span["span_id"] for span in spans}
    children: dict[str, list[Mapping[str, Any]]] = {}
    for span in sorted(spans, key=lambda one: one["start"]):
        parent = span["parent_id"] if span["parent_id"] in known else ""
        children.setdefault(parent, []).append(span)
    rows: list[tuple[int, Mapping[str, Any]]] = []

    def add(parent: str, depth: int) -> None:
        for span in children.get(parent, ()):
            rows.append((depth, span))
            add(span["span_id"], depth + 1)

    add("", 0)
    return rows
