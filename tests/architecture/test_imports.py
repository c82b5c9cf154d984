"""What may be imported where: the parts meet in one package, heavy libraries have one home."""

import ast

import pytest
from tests.architecture.sources import PACKAGES, imported_names, modules

# Where a library may be imported; everywhere else it may not.
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
    "kagami_proto.generate_pb2": (
        "proto/",
        "router/kagami_router/shards/",
        "shard/kagami_shard/service.py",
        "shard/kagami_shard/server.py",
    ),
}
SCHEDULER = [name for name in sorted(modules()) if name.startswith("kagami_router.scheduler")]


def imports(name: str, library: str) -> bool:
    return any(each == library or each.startswith(f"{library}.") for each in imported_names(name))


@pytest.mark.parametrize("name", sorted(modules()))
def test_parts_meet_only_in_proto(name: str) -> None:
    tops = {each.partition(".")[0] for each in imported_names(name)}

    assert tops & set(PACKAGES) <= {modules()[name].package, "kagami_proto"}


@pytest.mark.parametrize("name", sorted(modules()))
def test_imports_are_absolute(name: str) -> None:
    relative = [
        node.lineno
        for node in ast.walk(modules()[name].tree)
        if isinstance(node, ast.ImportFrom) and node.level
    ]
    assert relative == []


@pytest.mark.parametrize("library", HOMES)
def test_heavy_libraries_stay_at_home(library: str) -> None:
    users = {module.path for name, module in modules().items() if imports(name, library)}

    assert users
    assert not {user for user in users if not user.startswith(HOMES[library])}


@pytest.mark.parametrize("name", SCHEDULER)
def test_the_scheduler_is_pure(name: str) -> None:
    forbidden = ("asyncio", "time", "socket", "grpc", "threading", "random")

    assert not [library for library in forbidden if imports(name, library)]
    assert not any(
        isinstance(node, ast.AsyncFunctionDef | ast.Await)
        for node in ast.walk(modules()[name].tree)
    )


@pytest.mark.parametrize("name", sorted(modules()))
def test_only_a_parts_command_line_reads_the_environment(name: str) -> None:
    module = modules()[name]

    if not module.path.endswith(("cli.py", "__main__.py")):
        assert "os.environ" not in module.text
        assert "getenv" not in module.text
