"""What /proc tells of a server's processes: who belongs to it, and what memory they hold.

A server is started in a session of its own. All that it starts stays in that session, also where
it makes process groups, or loses its parent.
"""

import contextlib
import os
import signal
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

PROC = Path("/proc")
_PAGE = os.sysconf("SC_PAGE_SIZE")


def sessions(proc: Path = PROC) -> dict[int, list[int]]:
    """The processes of every session."""
    found: dict[int, list[int]] = {}
    for entry in os.listdir(proc):
        if entry.isdecimal():
            with contextlib.suppress(OSError):  # it has just ended
                # The name, in brackets, may hold anything; behind it: state ppid pgrp session.
                text = (proc / entry / "stat").read_text(errors="replace").rpartition(")")[2]
                found.setdefault(int(text.split()[3]), []).append(int(entry))
    return found


def resident_bytes(pids: Iterable[int], proc: Path = PROC) -> int:
    """Resident pages, those that are shared counted in every process. Costs next to nothing."""
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            total += int((proc / str(pid) / "statm").read_text().split()[1]) * _PAGE
    return total


def proportional_bytes(pids: Iterable[int], proc: Path = PROC) -> int:
    """Shared pages divided among those that share them. The kernel walks every page for it."""
    total = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            total += _pss((proc / str(pid) / "smaps_rollup").read_text())
    return total


def _pss(text: str) -> int:
    for line in text.splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    return 0  # it is ending: no pages are left


def send(number: signal.Signals, chosen: Collection[int]) -> None:
    """Send all processes of some sessions a signal."""
    for session, pids in sessions().items():
        for pid in pids if session in chosen else ():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)


@contextlib.contextmanager
def stopped(chosen: Collection[int]) -> Iterator[None]:
    """Some sessions' processes stand still meanwhile."""
    try:
        send(signal.SIGSTOP, chosen)
        yield
    finally:
        send(signal.SIGCONT, chosen)
