"""What the control groups of this process leave it of memory and of the processors' time.

Read from cgroup v2 (the kernel's `Documentation/admin-guide/cgroup-v2.rst`): a limit may stand at
every group from the process's own up to the root, be it of a systemd unit or of a container, and
the smallest holds. Limits of cgroup v1 are not read.
"""

import math
from collections.abc import Callable, Iterator
from pathlib import Path

_ROOT = Path("/sys/fs/cgroup")
_OWN = Path("/proc/self/cgroup")


def available_bytes(root: Path = _ROOT, own: Path = _OWN) -> int | None:
    """Bytes until the nearest limit, `memory.max`; None: no limit.

    Pages of files that nobody used lately count as available, as they are given up first: a
    checkpoint that was just read fills whatever the group may have with them.
    """
    return _smallest(_available_in, root, own)


def num_cores(root: Path = _ROOT, own: Path = _OWN) -> int | None:
    """Cores whose time this process may use up, `cpu.max`, rounded up; None: no limit."""
    return _smallest(_cores_of, root, own)


def _smallest(limit: Callable[[Path], int | None], root: Path, own: Path) -> int | None:
    limits = [limit(group) for group in _groups(root, own)]
    return min((one for one in limits if one is not None), default=None)


def _groups(root: Path, own: Path) -> Iterator[Path]:
    """The folders of the process's groups, the nearest first, the root's last."""
    names = [line[len("0::/") :] for line in _lines(own) if line.startswith("0::/")]
    # A container without a cgroup namespace of its own does not see where its groups lie.
    inner = Path(names[0]) if names and ".." not in names[0] else Path()
    yield from (root / folder for folder in (inner, *inner.parents))


def _available_in(group: Path) -> int | None:
    limit, used = _number(group / "memory.max"), _number(group / "memory.current")
    if limit is None or used is None:
        return None
    words = (line.split() for line in _lines(group / "memory.stat"))
    unused = next((int(number) for key, number in words if key == "inactive_file"), 0)
    return max(0, limit - used + unused)


def _cores_of(group: Path) -> int | None:
    match [line.split() for line in _lines(group / "cpu.max")]:
        case [[quota, period]] if quota.isdecimal():
            return max(1, math.ceil(int(quota) / int(period)))
        case _:
            return None


def _number(path: Path) -> int | None:
    match _lines(path):
        case [number] if number.isdecimal():
            return int(number)
        case _:
            return None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
