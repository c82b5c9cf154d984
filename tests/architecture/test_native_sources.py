"""The C++ sources: no two files include or call one another in a circle."""

import re
from pathlib import Path

from tests.architecture.sources import ROOT, circles

SOURCES = ROOT / "shard/kagami_shard/backends/native/src"
# As clang-format leaves them: a function starts at the left margin.
_HEAD = r'^(?:extern "C" )?[A-Za-z_][\w:<>,*& ]*?[ *&](\w+)\([^{};]*\)(?: const)?'
DECLARED = re.compile(_HEAD + ";", re.MULTILINE)
DEFINED = re.compile(_HEAD + r" *\{", re.MULTILINE)


def code_of(path: Path) -> str:
    return re.sub(r"//.*", "", path.read_text(encoding="utf-8"))


def test_no_files_include_one_another_in_a_circle() -> None:
    includes = {
        path.name: frozenset(re.findall(r'#include "(\w+\.h)"', code_of(path)))
        for path in SOURCES.iterdir()
    }
    assert includes["linear.cpp"]
    assert not circles(includes)


def test_no_files_call_one_another_in_a_circle() -> None:
    """A file calls another if it names a function that a header declares and the other defines."""
    declared = {name for path in SOURCES.glob("*.h") for name in DECLARED.findall(code_of(path))}
    code = {path.name: code_of(path) for path in SOURCES.glob("*.cpp")}
    homes = {
        name: {file for file, text in code.items() if name in DEFINED.findall(text)}
        for name in declared
    }
    calls = {
        file: frozenset(
            home
            for name, files in homes.items()
            if file not in files and re.search(rf"\b{name}\b", text)
            for home in files
        )
        for file, text in code.items()
    }
    assert len(declared) > 20
    assert calls["linear.cpp"]
    assert not circles(calls)
