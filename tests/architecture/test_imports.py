"""Who may import whom read from the sources."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {
    "kagami_proto": ROOT / "proto",
    "kagami_router": ROOT / "router",
    "kagami_benchmark": ROOT / "router",
    "kagami_shard": ROOT / "shard",
    "kagami_launcher": ROOT / "launcher",
}
FILES = [
    (package, path)
    for package, folder in PACKAGES.items()
    for path in sorted((folder / package).rglob("*.py"))
]
# Where a heavy library may be imported; everywhere else it may not.
HOMES = {
    "torch": ("shard/", "launcher/kagami_launcher/convert/"),
    "transformers": ("shard/", "launcher/kagami_launcher/convert/"),
    "huggingface_hub": ("launcher/kagami_launcher/download/",),
    "gguf": ("launcher/kagami_launcher/convert/",),
    "aiohttp": (
        "router/kagami_router/api/",
        "router/kagami_router/app.py",
        "router/kagami_benchmark/",
    ),
    "grpc": (
        "proto/",
        "router/kagami_router/shards/client.py",
        "shard/kagami_shard/service.py",
        "shard/kagami_shard/server.py",
    ),
}


def imports(path: Path) -> set[str]:
    """Every module that the file imports, also inside functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            found.add(node.module or "")
    return found


@pytest.mark.parametrize(
    ("package", "path"), FILES, ids=lambda value: getattr(value, "name", value)
)
def test_parts_meet_only_in_proto(package: str, path: Path) -> None:
    tops = {name.partition(".")[0] for name in imports(path)}

    assert tops & set(PACKAGES) <= {package, "kagami_proto"}


@pytest.mark.parametrize("library", HOMES)
def test_heavy_libraries_stay_at_home(library: str) -> None:
    users = {
        path.relative_to(ROOT).as_posix()
        for _, path in FILES
        if library in {name.partition(".")[0] for name in imports(path)}
    }

    assert not {user for user in users if not user.startswith(HOMES[library])}


@pytest.mark.parametrize("path", sorted((ROOT / "router/kagami_router/scheduler").glob("*.py")))
def test_the_scheduler_is_pure(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))

    forbidden = {"asyncio", "time", "socket", "grpc", "threading", "random"}
    assert not forbidden & {name.partition(".")[0] for name in imports(path)}
    assert not any(isinstance(node, ast.AsyncFunctionDef | ast.Await) for node in ast.walk(tree))


@pytest.mark.parametrize(
    ("package", "path"), FILES, ids=lambda value: getattr(value, "name", value)
)
def test_the_environment_is_read_in_one_file(package: str, path: Path) -> None:
    text = path.read_text(encoding="utf-8")

    if path.name not in ("cli.py", "__main__.py"):
        assert "os.environ" not in text
        assert "getenv" not in text
