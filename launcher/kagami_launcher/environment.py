"""A child's environment and command, and what this machine is: devices, port, report.

Reads the machine, not the launcher's own environment: that comes in as a mapping.
"""

import errno
import platform
import shutil
import socket
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

from kagami_launcher import notify
from kagami_launcher.cli import flags
from kagami_launcher.plan import Devices

# Children get the flags by argv, or by what the plan adds: a variable that the launcher's command
# line overrode must not reach them behind its back. Nor do they speak to systemd.
_NOT_FOR_CHILDREN = frozenset(item.name.upper() for item, _ in flags()).union(notify.VARIABLES)
# In TGI's order: the first that is set counts.
DEVICE_VARIABLES = ("CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "ZE_AFFINITY_MASK")
_ALWAYS: Mapping[str, str] = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "PYTHONUNBUFFERED": "1"}


def for_shard(base: Mapping[str, str], additions: Mapping[str, str]) -> dict[str, str]:
    """The environment of a shard: the launcher's without its flags, plus the plan's additions."""
    kept = _without_flags(base)
    kept.pop("LOG_LEVEL", None)  # a flag of the shard, as in TGI
    return {**kept, **_ALWAYS, **additions}


def for_router(base: Mapping[str, str], additions: Mapping[str, str]) -> dict[str, str]:
    """The environment of the router."""
    return {**_without_flags(base), **_ALWAYS, **additions}


def for_conversion(base: Mapping[str, str]) -> dict[str, str]:
    """The environment of a conversion."""
    return {**_without_flags(base), **_ALWAYS}


def for_download(base: Mapping[str, str], additions: Mapping[str, str]) -> dict[str, str]:
    """The environment of a download: the hub's own variables reach huggingface_hub as they are."""
    kept = _without_flags(base)
    # Set in TGI's images; the library only warns that it is obsolete.
    kept.pop("HF_HUB_ENABLE_HF_TRANSFER", None)
    if token := kept.get("HF_API_TOKEN"):
        kept["HF_TOKEN"] = token
    # No statistics, and no request for them at each start.
    return {**kept, **_ALWAYS, "HF_HUB_DISABLE_TELEMETRY": "1", **additions}


def _without_flags(base: Mapping[str, str]) -> dict[str, str]:
    return {key: value for key, value in base.items() if key not in _NOT_FOR_CHILDREN}


def find_command(name: str, base: Mapping[str, str]) -> str | None:
    """The path of a command: beside this Python first (the same installation), then on PATH."""
    beside = Path(sys.executable).with_name(name)
    if beside.is_file():
        return str(beside)
    return shutil.which(name, path=base.get("PATH"))


def find_devices(base: Mapping[str, str]) -> Devices:
    """The CUDA devices a shard would see. torch is not asked: importing it takes seconds."""
    cards = [name for name in _ask_nvidia_smi(base).splitlines() if name.strip()]
    present = len(cards) or sum(
        path.name.removeprefix("nvidia").isdecimal() for path in Path("/dev").glob("nvidia*")
    )
    num_listed = _num_listed(base, present)
    visible = base.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        present = min(present, _num_visible(visible))
    card = cards[0].strip().lower().replace(" ", "-") if cards and present else ""
    return Devices(present, card, num_listed)


def _num_listed(base: Mapping[str, str], present: int) -> int | None:
    """How many devices the first of these variables lists, by TGI's rule: its commas count.

    `all`, which the container toolkit sets, and `void` mean the cards that nvidia-smi finds.
    """
    for name in DEVICE_VARIABLES:
        if (value := base.get(name)) is not None:
            is_all = name == "NVIDIA_VISIBLE_DEVICES" and value.strip() in ("all", "void")
            return present if is_all else len(value.split(","))
    return None


def _num_visible(value: str) -> int:
    """CUDA counts the entries up to the first invalid one; -1 and an empty list hide all."""
    count = 0
    for entry in value.split(","):
        if not entry.strip() or entry.strip() == "-1":
            break
        count += 1
    return count


def _ask_nvidia_smi(base: Mapping[str, str]) -> str:
    return _output(["nvidia-smi", "--query-gpu=gpu_name", "--format=csv,noheader"], base) or ""


def _output(argv: list[str], base: Mapping[str, str]) -> str | None:
    """What a command prints, or None if it is missing, fails or takes longer than 10 s."""
    if (path := shutil.which(argv[0], path=base.get("PATH"))) is None:
        return None
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(
            [path, *argv[1:]], capture_output=True, text=True, timeout=10, check=True
        )
        return done.stdout
    return None


def port_problem(address: str, port: int) -> str:
    """Why the port cannot be listened on, in one line; empty if it can, or if nobody knows."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((address, port))
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return f"port {port} of {address} is already in use"
        return f"cannot listen on port {port} of {address}: {error.strerror}"
    return ""


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
        text = _output([tool], base)
        indented = "\n".join("   " + line for line in text.splitlines()) if text else "N/A"
        lines.append(f"{tool}:\n{indented}")
    return "\n".join(lines)
