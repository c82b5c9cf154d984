"""Draws architecture.svg from the imports of the product: `python docs/draw_architecture.py`.

A frame is a process, a box is a room (a folder, or the files beside the folders), an arrow is an
import. Arrows that follow from others are left out: with a -> b and b -> c there is no a -> c. The
text in a box is the first line of the room's docstring. Numbers tell the path of one token; they
are the ones of architecture.md. A test draws the picture again and compares.
"""

import ast
import textwrap
from collections.abc import Iterator, Mapping, Set
from html import escape
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parent
ROOT = HERE.parent
PICTURE = HERE / "architecture.svg"

# Process -> its folder, package, title and the files that it starts with.
PARTS = {
    "launcher": ("launcher", "kagami_launcher", "text-generation-launcher", "main, plan, …"),
    "router": ("router", "kagami_router", "text-generation-router", "app, cli, …"),
    "shard": ("shard", "kagami_shard", "text-generation-server (a shard)", "server, service, cli"),
}
PROTO = "the wire, errors, log lines, traces: every process imports it, and none imports another"
# Folders that are drawn as their subfolders; all others are one room.
OPENED = {"kagami_router.api", "kagami_shard.backends"}
# Rooms that are drawn as one box.
MERGED = {
    f"kagami_router.api.{family}": "kagami_router.api"
    for family in ("native", "openai", "responses", "anthropic", "platforms", "docs", "routes")
}
# One token's path, numbered as in architecture.md.
PATH = {
    "kagami_router.api": "1",
    "kagami_router.request": "1",
    "kagami_router.serving": "2 3 6",
    "kagami_router.scheduler": "3",
    "kagami_router.shards": "4",
    "kagami_shard": "5",
    "kagami_shard.engine": "5",
    "kagami_router.text": "1 6",
    "kagami_router.api.web": "7",
}
BOX_WIDTH, BOX_HEIGHT, GAP, LAYER_GAP, MARGIN = 158, 90, 14, 40, 18
TOP, FRAME_TITLE = 96, 34


class Room(NamedTuple):
    """A box of the picture."""

    name: str
    title: str
    says: str


def room_of(module: str) -> str:
    """The room of a module: "kagami_router.api.web.sse" -> "kagami_router.api.web"."""
    parts = module.split(".")
    opened = ".".join(parts[:2]) in OPENED
    name = ".".join(parts[: 3 if opened else 2])
    name = MERGED.get(name, name)
    return name if is_room(name) else name.rpartition(".")[0]


def folder_of(room: str) -> Path:
    """Where a room lies: a folder, or the path that its module would have without ".py"."""
    package = room.partition(".")[0]
    part = next(folder for folder, name, *_ in PARTS.values() if name == package)
    return ROOT / part / room.replace(".", "/")


def is_room(name: str) -> bool:
    opened = name.rpartition(".")[0] in OPENED
    return folder_of(name).is_dir() or (opened and folder_of(name).with_suffix(".py").is_file())


def modules(package: str, folder: str) -> Iterator[tuple[str, ast.Module]]:
    """Every module of a package, parsed."""
    for path in sorted((ROOT / folder / package).rglob("*.py")):
        name = ".".join(path.relative_to(ROOT / folder).with_suffix("").parts)
        yield name.removesuffix(".__init__"), ast.parse(path.read_text(encoding="utf-8"))


def imports(tree: ast.Module, package: str) -> Iterator[str]:
    """The modules and names of the same package that a module imports."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names):
                yield from (one.name for one in names if one.name.startswith(package + "."))
            case ast.ImportFrom(module=str(source), names=names) if source.startswith(package):
                yield from (f"{source}.{one.name}" for one in names)


def arrows_of(package: str, folder: str) -> dict[str, set[str]]:
    """Every room of a package, with the rooms that it imports."""
    arrows: dict[str, set[str]] = {package: set()}
    for name, tree in modules(package, folder):
        room = room_of(name)
        targets = {room_of(each) for each in imports(tree, package)} - {room, package}
        arrows.setdefault(room, set()).update(targets)
    return {room: arrows[room] for room in sorted(arrows) if room not in OPENED or arrows[room]}


def reached(start: str, arrows: Mapping[str, Set[str]]) -> set[str]:
    """All rooms below a room."""
    found: set[str] = set()
    todo = [start]
    while todo:
        for other in arrows.get(todo.pop(), ()):
            if other not in found:
                found.add(other)
                todo.append(other)
    return found


def reduced(arrows: Mapping[str, Set[str]]) -> dict[str, set[str]]:
    """Without the arrows that follow from others."""
    return {
        room: {
            other
            for other in targets
            if not any(other in reached(each, arrows) for each in targets - {other})
        }
        for room, targets in arrows.items()
    }


def layers_of(arrows: Mapping[str, Set[str]]) -> list[list[str]]:
    """The rooms from top to bottom: each one below all that import it, as high as it can be."""
    above = {
        room: {other for other in arrows if room in reached(other, arrows)} - reached(room, arrows)
        for room in arrows
    }
    depth: dict[str, int] = {}
    for room in sorted(arrows, key=lambda each: (len(above[each]), each)):
        depth[room] = max((depth[other] + 1 for other in above[room] if other in depth), default=0)
    rows: list[list[str]] = [[] for _ in range(max(depth.values()) + 1)]
    for room in sorted(depth):
        rows[depth[room]].append(room)
    return rows


def describe(room: str) -> Room:
    """A room's title and the first line of its docstring."""
    folder = folder_of(room)
    path = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
    line = (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n")[0]
    files = next((files for _, package, _, files in PARTS.values() if package == room), None)
    return Room(room, files or room.partition(".")[2].replace(".", "/"), line.replace("`", ""))


def text(x: float, y: float, words: str, style: str) -> str:
    return f'<text x="{x:g}" y="{y:g}" class="{style}">{escape(words)}</text>'


def box(room: Room, x: float, y: float) -> Iterator[str]:
    """A room, with its numbers on the corner."""
    yield (
        f'<rect x="{x:g}" y="{y:g}" width="{BOX_WIDTH}" height="{BOX_HEIGHT}" rx="6" class="room"/>'
    )
    yield text(x + 10, y + 20, room.title, "name")
    for number, line in enumerate(textwrap.wrap(room.says, 26, max_lines=4, placeholder=" …")):
        yield text(x + 10, y + 36 + 13 * number, line, "says")
    for number, step in enumerate(reversed(PATH.get(room.name, "").split())):
        middle = x + BOX_WIDTH - 12 - 20 * number
        yield f'<circle cx="{middle:g}" cy="{y:g}" r="9" class="step"/>'
        yield text(middle, y + 4, step, "number")


def width_of(rows: list[list[str]]) -> int:
    return max(len(row) for row in rows) * (BOX_WIDTH + GAP) - GAP + 2 * MARGIN


def height_of(rows: list[list[str]]) -> int:
    return FRAME_TITLE + 12 + len(rows) * (BOX_HEIGHT + LAYER_GAP) - LAYER_GAP + MARGIN


def part(key: str, left: float) -> Iterator[str]:
    """One process: its frame, arrows and boxes."""
    folder, package, title, _ = PARTS[key]
    arrows = arrows_of(package, folder)
    rows = layers_of(arrows)
    width, height = width_of(rows), height_of(rows)
    yield (
        f'<rect x="{left:g}" y="{TOP}" width="{width:g}" height="{height:g}" rx="10" class="part"/>'
    )
    yield text(left + MARGIN, TOP + 23, title, "title")
    places: dict[str, tuple[float, float]] = {}
    for depth, row in enumerate(rows):
        step = (width - 2 * MARGIN + GAP) / len(row)
        for number, room in enumerate(row):
            x = left + MARGIN + step * number + (step - GAP - BOX_WIDTH) / 2
            places[room] = (x, TOP + FRAME_TITLE + 12 + depth * (BOX_HEIGHT + LAYER_GAP))
    for room, targets in sorted(reduced(arrows).items()):
        for other in sorted(targets):
            x, y = places[room]
            to_x, to_y = places[other]
            if to_y > y:
                half = BOX_WIDTH / 2
                yield (
                    f'<path d="M{x + half:g} {y + BOX_HEIGHT:g} L{to_x + half:g} {to_y - 3:g}" '
                    f'class="arrow" marker-end="url(#end)"/>'
                )
    for room, (x, y) in sorted(places.items()):
        yield from box(describe(room), x, y)


STYLE = """
svg { background: #ffffff; font-family: "DejaVu Sans", "Helvetica", sans-serif; }
.part { fill: #f4f6f8; stroke: #8795a1; stroke-width: 1.5; }
.proto { fill: #eef5ee; stroke: #7f9f7f; stroke-width: 1.5; }
.room { fill: #ffffff; stroke: #52606d; }
.title { font-size: 15px; font-weight: bold; fill: #1f2933; }
.name { font-size: 12px; font-weight: bold; fill: #1f2933; }
.says { font-size: 10px; fill: #3e4c59; }
.wire { font-size: 12px; fill: #9b3922; text-anchor: middle; }
.arrow { stroke: #9aa5b1; fill: none; }
.talk { stroke: #9b3922; stroke-width: 2; fill: none; }
.step { fill: #9b3922; }
.number { font-size: 11px; font-weight: bold; fill: #ffffff; text-anchor: middle; }
"""


def talk(path: str, x: float, y: float, words: str) -> Iterator[str]:
    """What two processes say to each other."""
    yield f'<path d="{path}" class="talk" marker-start="url(#talk)" marker-end="url(#talk)"/>'
    yield text(x, y, words, "wire")


def draw() -> str:
    """The whole picture."""
    lefts, rights, bottom, x = {}, {}, 0, 20
    for key, (folder, package, *_) in PARTS.items():
        rows = layers_of(arrows_of(package, folder))
        lefts[key], rights[key] = x, x + width_of(rows)
        bottom = max(bottom, TOP + height_of(rows))
        x = rights[key] + 40
    total = x - 20
    middles = {key: (lefts[key] + rights[key]) / 2 for key in PARTS}
    first, last = lefts["router"] + 60, rights["router"] - 60
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {total:g} {bottom + 84:g}">',
        f"<style>{STYLE}</style>",
        '<defs><marker id="end" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
        'markerHeight="7" orient="auto"><path d="M0 0L8 4L0 8z" fill="#9aa5b1"/></marker>'
        '<marker id="talk" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="5" markerHeight="5" '
        'orient="auto-start-reverse"><path d="M0 0L8 4L0 8z" fill="#9b3922"/></marker></defs>',
        *talk(
            f"M{middles['router']:g} 40 L{middles['router']:g} {TOP - 2}",
            middles["router"],
            30,
            "clients: HTTP, server-sent events",
        ),
        *talk(
            f"M{last:g} {TOP - 2} L{last:g} 68 "
            f"L{middles['shard']:g} 68 L{middles['shard']:g} {TOP - 2}",
            (last + middles["shard"]) / 2,
            60,
            "gRPC on a Unix socket: Step, StepResult",
        ),
        *talk(
            f"M{middles['launcher']:g} {TOP - 2} L{middles['launcher']:g} 68 "
            f"L{first:g} 68 L{first:g} {TOP - 2}",
            (middles["launcher"] + first) / 2,
            60,
            "starts and watches router and shards",
        ),
    ]
    for key in PARTS:
        parts += part(key, lefts[key])
    parts += [
        f'<rect x="20" y="{bottom + 24:g}" width="{total - 40:g}" height="44" rx="10" '
        'class="proto"/>',
        text(38, bottom + 51, "kagami_proto", "title"),
        text(180, bottom + 51, PROTO, "says"),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    PICTURE.write_text(draw(), encoding="utf-8")
