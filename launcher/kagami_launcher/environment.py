"""A child's environment and command, the port, and the report of --env.

Reads the machine, not the launcher's own environment: that comes in as a mapping.
"""

import errno
import platform
import shutil
import socket
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

from kagami_launcher import notify
from kagami_launcher.cli import flags
from kagami_launcher.devices import command_output

# Children get the flags by argv, or by what the plan adds: a variable that the launcher's command
# line overrode must not reach them behind its back. Nor do they speak to systemd.
_NOT_FOR_CHILDREN = frozenset(item.name.upper() for item, _ in flags()).union(notify.VARIABLES)
_ALWAYS: Mapping[str, str] = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "PYTHONUNBUFFERED": "1"}


def for_shard(base: Mapping[str, str], additions: Mapping[str, str]) -> dict[str, str]:
    """The environment of a shard: the launcher's without its flags, plus the plan's additions."""
    rest = _without_flags(base)
    rest.pop("LOG_LEVEL", None)  # a flag of the shard, as in TGI
    return {**rest, **_ALWAYS, **additions}


def for_router(base: Mapping[str, str], additions: Mapping[str, str]) -> dict[str, str]:
    """The environment of the router."""
    return {**_without_flags(base), **_ALWAYS, **additions}


def for_conversion(base: Mapping[str, str]) -> dict[str, str]:
    """The environment of a conversion."""
    return {**_without_flags(base), **_ALWAYS}


def for_download(base: Mapping[str, str], additions: Mapping[str, str]) -> dict[str, str]:
    """The environment of a download: the hub's own variables reach huggingface_hub as they are."""
    rest = _without_flags(base)
    # Set in TGI's images; the library only warns that it is obsolete.
    rest.pop("HF_HUB_ENABLE_HF_TRANSFER", None)
    if token := rest.get("HF_API_TOKEN"):
        rest["HF_TOKEN"] = token
    # No statistics, and no request for them at each start.
    return {**rest, **_ALWAYS, "HF_HUB_DISABLE_TELEMETRY": "1", **additions}


def _without_flags(base: Mapping[str, str]) -> dict[str, str]:
    return {key: value for key, value in base.items() if key not in _NOT_FOR_CHILDREN}


def find_command(name: str, base: Mapping[str, str]) -> str | None:
    """The path of a command: beside this Python first (the same installation), then on PATH."""
    beside = Path(sys.executable).with_name(name)
    if beside.is_file():
        return str(beside)
    return shutil.which(name, path=base.get("PATH"))


def port_problem(host: str, port: int) -> str:
    """Why nobody can listen on the port, in one line; empty if it is free.

    One address of a name is enough: "localhost" has ::1 also where IPv6 is off.
    """
    problem, is_free = "", False
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:  # Unicode: a name that DNS cannot even write
        reason = error.strerror if isinstance(error, OSError) else error
        return f"cannot listen on port {port} of {host}: {reason}"
    for family, kind, _, _, address in found:
        try:
            with socket.socket(family, kind) as listener:
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                listener.bind(address)
            is_free = True
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return f"port {port} of {host} is already in use"
            problem = f"cannot listen on port {port} of {host}: {error.strerror}"
    return "" if is_free else problem


def report(base: Mapping[str, str]) -> str:
    """The block that TGI's bug reports ask for (--env)."""
    lines = [
        "Runtime environment:",
        f"Target: {platform.machine()}-{platform.system().lower()}",
        f"Kagami version: {version('kagami-tgi')}",
        f"Python version: {platform.python_version()}",
        f"Commit sha: {base.get('VERGEN_GIT_SHA') or 'N/A'}",
        f"Docker label: {base.get('DOCKER_LABEL') or 'N/A'}",
    ]
    for tool in ("nvidia-smi", "xpu-smi", "hpu-smi"):
        text = command_output([tool], base)
        indented = "\n".join("   " + line for line in text.splitlines()) if text else "N/A"
        lines.append(f"{tool}:\n{indented}")
    return "\n".join(lines)
