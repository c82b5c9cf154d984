"""No member of the product is used by tests alone: what only tests call is dead code with a test.

Names are counted, not resolved. A name that the product uses anywhere counts as used everywhere,
so a dead member with a common name is not found; a member that is found has no user at all.
"""

import ast
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from tests.architecture.sources import Module, modules


class Member(NamedTuple):
    """A name that a module defines: a class, function, method, field, `self.x` or constant."""

    name: str
    place: str


# Called from outside of the product's own code.
CALLED_BY_OTHERS = {
    # the gRPC service, by its stubs
    "Info",
    "Health",
    "Warmup",
    "CompileGrammar",
    "Run",
}


# What is held only to stay in memory, for somebody has a pointer to it.
HELD = {"_alive"}
# Their fields are read one and all, as flags or as JSON.
READ_AS_A_WHOLE = {"LauncherArgs", "ResultRow"}
# Bases that call nothing of a class by themselves.
QUIET_BASES = {"Protocol", "NamedTuple", "Generic", "ABC", "Exception", "RuntimeError"}


def base_names(node: ast.ClassDef) -> set[str]:
    """The names of a class's bases, without modules and type parameters."""
    bases = (base.value if isinstance(base, ast.Subscript) else base for base in node.bases)
    return {ast.unparse(base).rpartition(".")[2] for base in bases}


def foreign_classes(sources: Iterable[Module]) -> set[str]:
    """Classes whose members a library uses: JSON structs, enums, handlers and their heirs."""
    classes: dict[str, set[str]] = {}
    for source in sources:
        for node in ast.walk(source.tree):
            if isinstance(node, ast.ClassDef):
                classes[node.name] = classes.get(node.name, set()) | base_names(node)
    own = {name for name, bases in classes.items() if bases <= QUIET_BASES}
    while grown := {name for name, bases in classes.items() if bases <= QUIET_BASES | own} - own:
        own |= grown
    return classes.keys() - own


def members_of(body: list[ast.stmt], path: str, foreign: set[str]) -> Iterator[Member]:
    for node in body:
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                yield Member(node.name, f"{path}:{node.lineno}")
            case ast.ClassDef():
                yield Member(node.name, f"{path}:{node.lineno}")
                if node.name not in foreign | READ_AS_A_WHOLE:
                    yield from members_of(node.body, path, foreign)
                    yield from attributes_of(node, path)
            case ast.Assign(targets=[ast.Name(name)]) | ast.AnnAssign(target=ast.Name(name)):
                yield Member(name, f"{path}:{node.lineno}")
            case ast.If():
                yield from members_of(node.body, path, foreign)


def attributes_of(node: ast.ClassDef, path: str) -> Iterator[Member]:
    """What methods assign to `self`."""
    for each in ast.walk(node):
        match each:
            case ast.Attribute(ast.Name("self"), name, ast.Store()):
                yield Member(name, f"{path}:{each.lineno}")


def uses_of(tree: ast.Module) -> Iterator[str]:
    """Every name that is read, or matched by a pattern.

    An import alone, a keyword argument and a name in `__slots__` are no uses.
    """
    for node in ast.walk(tree):
        match node:
            case ast.Name(name, ast.Load()) | ast.Attribute(attr=name, ctx=ast.Load()):
                yield name
            case ast.MatchClass(kwd_attrs=names):
                yield from names


def test_no_member_is_used_by_tests_alone() -> None:
    sources = [each for each in modules().values() if "_pb2" not in each.path]
    used = {name for source in sources for name in uses_of(source.tree)}
    foreign = foreign_classes(sources)
    members = [
        each for source in sources for each in members_of(source.tree.body, source.path, foreign)
    ]

    dead = [
        each
        for each in members
        if each.name not in used | CALLED_BY_OTHERS | HELD and not each.name.startswith("__")
    ]

    assert "\n".join(f"{each.place} {each.name}" for each in dead) == ""
