"""Who may import whom: the rooms as one table, no import circle, and who asks what a device is."""

import ast
from collections.abc import Mapping
from fnmatch import fnmatchcase

import pytest
from tests.architecture.sources import circles, imported_modules, modules

# What every family of routes sees.
_ANSWERS = "api.answering api.web api.schemas serving request text tools"
# A room is a folder or a file; the longest name that fits a module is its room. A room may import
# itself, `kagami_proto`, and what stands here. "*": it puts the part together and sees all of it.
ROUTER: Mapping[str, str] = {
    "kagami_router": "*",
    "kagami_router.cli": "",
    "kagami_router.api": "api.*",
    "kagami_router.api.native": f"{_ANSWERS} telemetry",
    "kagami_router.api.openai": _ANSWERS,
    "kagami_router.api.responses": _ANSWERS,
    "kagami_router.api.anthropic": _ANSWERS,
    "kagami_router.api.platforms": f"api.native api.openai {_ANSWERS}",
    "kagami_router.api.docs": "api.web api.schemas",
    "kagami_router.api.answering": "api.web api.schemas serving request text tools",
    "kagami_router.api.web": "api.schemas serving request text tools telemetry",
    "kagami_router.api.schemas": "",
    "kagami_router.serving": "scheduler shards request text telemetry",
    "kagami_router.shards": "scheduler request telemetry",
    "kagami_router.telemetry": "scheduler request",
    "kagami_router.scheduler": "request",
    "kagami_router.request": "text",
    "kagami_router.tools": "request text",
    "kagami_router.text": "",
}
SHARD: Mapping[str, str] = {
    "kagami_shard": "*",
    "kagami_shard.cli": "",
    "kagami_shard.service": "engine sampling forward",
    "kagami_shard.engine": "backends.base forward sampling machine",
    "kagami_shard.backends": "",
    "kagami_shard.backends.select": "backends.* models machine",
    "kagami_shard.backends.base": "models layers sampling forward machine",
    "kagami_shard.backends.elapsed": "",
    "kagami_shard.backends.torch": "backends.base backends.elapsed models layers weights sampling "
    "forward machine",
    # torch is the reference: the library is compared with it, and takes over from it.
    "kagami_shard.backends.native": "backends.base backends.elapsed backends.torch models layers "
    "quantization weights sampling forward machine",
    "kagami_shard.models": "layers quantization weights forward machine",
    "kagami_shard.layers": "quantization weights forward machine",
    "kagami_shard.quantization": "weights machine",
    "kagami_shard.weights": "",
    "kagami_shard.sampling": "machine",
    "kagami_shard.forward": "machine",
    "kagami_shard.machine": "",
}
LAUNCHER: Mapping[str, str] = {
    "kagami_launcher": "*",
    "kagami_launcher.prepare": "cli environment errors model plan process_tree",
    "kagami_launcher.process_tree": "child cli environment errors notify plan sockets supervisor",
    "kagami_launcher.plan": "checks cli devices model",
    "kagami_launcher.checks": "cli devices errors",
    "kagami_launcher.environment": "cli devices notify",
    "kagami_launcher.sockets": "errors",
    "kagami_launcher.errors": "cli",
    "kagami_launcher.cli": "model",
    "kagami_launcher.devices": "",
    "kagami_launcher.health": "",
    "kagami_launcher.notify": "",
    "kagami_launcher.supervisor": "child",
    "kagami_launcher.child": "",
    "kagami_launcher.convert": "model",
    "kagami_launcher.download": "model",
    "kagami_launcher.model": "",
}
RULES = {**ROUTER, **SHARD, **LAUNCHER, "kagami_benchmark": "", "kagami_proto": ""}


def room_of(module: str) -> str:
    return max((room for room in RULES if module == room or module.startswith(f"{room}.")), key=len)


def may_import(source: str, target: str) -> bool:
    room, other = room_of(source), room_of(target)
    if room == other or other == "kagami_proto":
        return True
    package = room.partition(".")[0]
    allowed = [f"{package}.{pattern}" for pattern in RULES[room].split()]
    return any(fnmatchcase(other, pattern) for pattern in allowed)


@pytest.mark.parametrize("name", sorted(modules()))
def test_rooms_import_only_what_lies_below_them(name: str) -> None:
    assert [each for each in sorted(imported_modules(name)) if not may_import(name, each)] == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert circles({name: imported_modules(name) for name in modules()}) == []


def test_no_rooms_import_each_other_in_a_circle() -> None:
    arrows: dict[str, set[str]] = {}
    for name in modules():
        room = room_of(name)
        arrows.setdefault(room, set()).update(map(room_of, imported_modules(name)))

    assert circles({room: frozenset(others - {room}) for room, others in arrows.items()}) == []


def asks_for_the_device(node: ast.AST) -> bool:
    """`x.device.type`, `self._device.type`, `x.is_cuda`, `torch.cuda`."""
    match node:
        case ast.Attribute(ast.Name(owner) | ast.Attribute(attr=owner), "type"):
            return owner.endswith("device")
        case ast.Attribute(attr="is_cuda" | "is_cpu"):
            return True
        case ast.Attribute(ast.Name("torch"), "cuda"):
            return True
        case ast.ImportFrom(module="torch", names=names):
            return any(alias.name == "cuda" for alias in names)
        case ast.ImportFrom(module=str(source)):
            return source.startswith("torch.cuda")
    return False


@pytest.mark.parametrize(
    "name",
    [
        name
        for name in sorted(modules())
        if not name.startswith(("kagami_shard.backends", "kagami_shard.machine"))
    ],
)
def test_only_backends_and_the_machine_ask_what_a_device_is(name: str) -> None:
    asking = [node for node in ast.walk(modules()[name].tree) if asks_for_the_device(node)]

    assert [ast.unparse(node) for node in asking] == []


def test_the_engine_asks_no_model_and_no_backend_what_it_is() -> None:
    theirs = {
        node.name
        for name, module in modules().items()
        if name.startswith(("kagami_shard.backends", "kagami_shard.models"))
        for node in ast.walk(module.tree)
        if isinstance(node, ast.ClassDef)
    }

    asked = [
        f"{name}: {ast.unparse(node)}"
        for name, module in modules().items()
        if name.startswith("kagami_shard.engine")
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) == "isinstance"
        and theirs & {each.id for each in ast.walk(node.args[1]) if isinstance(each, ast.Name)}
    ]

    assert asked == []
