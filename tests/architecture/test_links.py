"""Every link in the documents leads somewhere, and every source file they name exists."""

import re
import subprocess
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
from tests.architecture.sources import ROOT

# [text](target) and ![picture](target); a target in the web is nobody's business here.
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
WEB = ("http://", "https://", "mailto:")
# `name.py` or `folder/name.cpp`, alone between backticks.
SOURCE = re.compile(r"`([\w./-]+\.(?:py|cpp|h|proto|md|yaml|service))`")
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
HEADING = re.compile(r"^#+ +(.+?) *$", re.MULTILINE)


@cache
def files() -> tuple[str, ...]:
    """What git knows or would add, from the root; a tree without git is read as it lies."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    try:
        ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        names = ran.stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        names = [path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*") if path.is_file()]
    return tuple(
        sorted(
            name
            for name in names
            if (ROOT / name).is_file() and not {".venv", "node_modules"} & set(Path(name).parts)
        )
    )


DOCUMENTS = [name for name in files() if name.endswith(".md")]


def prose(path: Path) -> str:
    """A document without its fenced code."""
    return FENCE.sub("", path.read_text(encoding="utf-8"))


def anchor(heading: str) -> str:
    """A heading's fragment, as GitHub makes it."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


@cache
def anchors(path: Path) -> frozenset[str]:
    """Every fragment of a document; the second heading of one text gets "-1" behind it."""
    seen: Counter[str] = Counter()
    found = set()
    for first in map(anchor, HEADING.findall(prose(path))):
        found.add(f"{first}-{seen[first]}" if seen[first] else first)
        seen[first] += 1
    return frozenset(found)


def broken_links(document: Path, root: Path = ROOT) -> list[str]:
    """The targets that are not there, or lie outside of the tree."""
    broken = []
    for target in LINK.findall(prose(document)):
        if target.startswith(WEB):
            continue
        name, _, fragment = target.partition("#")
        path = (document.parent / name).resolve() if name else document
        missing = not path.exists() or not path.is_relative_to(root)
        if missing or (fragment and path.suffix == ".md" and fragment not in anchors(path)):
            broken.append(target)
    return broken


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_link_leads_somewhere(name: str) -> None:
    assert broken_links(ROOT / name) == []


def missing_sources(document: Path) -> list[str]:
    """The source files that are named and are nowhere in the tree; a part of a path is enough."""
    known = ["/" + each for each in files()]
    return [
        named
        for named in SOURCE.findall(prose(document))
        if not (document.parent / named).is_file()
        and not any(each.endswith("/" + named) for each in known)
    ]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_source_file_that_is_named_exists(name: str) -> None:
    assert missing_sources(ROOT / name) == []


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    document = tmp_path / "page.md"
    document.write_text("# A `b`, c\n[here](#a-b-c) [gone](no.md) [odd](#nowhere)\n")

    assert broken_links(document, tmp_path) == ["no.md", "#nowhere"]


def test_a_source_file_that_is_gone_is_found(tmp_path: Path) -> None:
    document = tmp_path / "page.md"
    document.write_text("`scheduler/blocks.py` `scheduler/gone.py` `a b.py`\n")

    assert missing_sources(document) == ["scheduler/gone.py"]


# "notes/0004" in a comment is the part's own note, "router/notes/0009" another part's.
NOTE = re.compile(r"(?:\b(router|shard|launcher|proto)/)?\bnotes/(\d{4})")
CODE = [name for name in files() if name.endswith((".py", ".cpp", ".h", ".proto"))]


def test_every_note_that_the_code_names_exists() -> None:
    notes = {name[: name.index("notes/") + 10] for name in files() if "/notes/0" in name}

    named = [
        (name, f"{part or name.partition('/')[0]}/notes/{number}")
        for name in CODE
        if not name.startswith("tests/")
        for part, number in NOTE.findall((ROOT / name).read_text(encoding="utf-8"))
    ]

    assert named
    assert [(name, note) for name, note in named if note not in notes] == []
