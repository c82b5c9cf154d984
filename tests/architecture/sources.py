"""The product's sources, parsed once: modules, what each imports, and the room it lives in."""

import ast
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PACKAGES = {
    "kagami_proto": "proto",
    "kagami_router": "router",
    "kagami_benchmark": "router",
    "kagami_shard": "shard",
    "kagami_launcher": "launcher",
}


class Module(NamedTuple):
    """One file of the product."""

    name: str
    """As it is imported: "kagami_router.api.routes"."""
    path: str
    """From the root of the tree."""
    tree: ast.Module

    @property
    def package(self) -> str:
        return self.name.partition(".")[0]

    @property
    def text(self) -> str:
        return (ROOT / self.path).read_text(encoding="utf-8")


@cache
def modules() -> dict[str, Module]:
    """Every module of the product by its name."""
    found = {}
    for package, folder in PACKAGES.items():
        for path in sorted((ROOT / folder / package).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            name = ".".join(parts).removesuffix(".__init__")
            tree = ast.parse(path.read_text(encoding="utf-8"))
            found[name] = Module(name, path.relative_to(ROOT).as_posix(), tree)
    return found


@cache
def imported_names(name: str) -> frozenset[str]:
    """All that a module imports, also inside functions and by `import_module("…")`.

    `from a import b` gives both "a" and "a.b", for b may be a module.
    """
    found: set[str] = set()
    for node in ast.walk(modules()[name].tree):
        match node:
            case ast.Import():
                found |= {alias.name for alias in node.names}
            case ast.ImportFrom(module=str(source)):
                found |= {source, *(f"{source}.{alias.name}" for alias in node.names)}
            case ast.Call(func=ast.Name("import_module"), args=[ast.Constant(str(source))]):
                found.add(source)
    return frozenset(found)


def imported_modules(name: str) -> frozenset[str]:
    """The product's modules that a module imports, without the packages around them."""
    found = imported_names(name) & modules().keys() - {name}
    return frozenset(
        one for one in found if not any(other.startswith(one + ".") for other in found)
    )


def circles(arrows: dict[str, frozenset[str]]) -> list[list[str]]:
    """The groups of nodes that reach one another (Tarjan's strongly connected components)."""
    order: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        order[node] = lowest[node] = len(order)
        stack.append(node)
        for target in sorted(arrows.get(node, ())):
            if target not in order:
                visit(target)
                lowest[node] = min(lowest[node], lowest[target])
            elif target in stack:
                lowest[node] = min(lowest[node], order[target])
        if lowest[node] == order[node]:
            start = stack.index(node)
            if len(stack) - start > 1:
                found.append(sorted(stack[start:]))
            del stack[start:]

    for node in sorted(arrows):
        if node not in order:
            visit(node)
    return found
