"""The outermost frame of each process: what the machine refuses is one line, exit code 1.

Memory, threads, descriptors and closed standard streams are no bugs of ours, and a traceback says
nothing about them. Anything else that gets here is a bug, and keeps its traceback.
"""

import errno
import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, TypeVar

T = TypeVar("T")

_LIMITS = "too little memory, or too few threads or open files are allowed (ulimit, cgroup)"
_ERRNOS = frozenset({errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EAGAIN})
# What libc's loader, CPython and torch say where they give the reason as text only.
_TEXTS = (
    "failed to map segment",
    "cannot allocate memory",
    "can't start new thread",
    "can't allocate memory",
    "not enough memory",
)
_MAX_CHAIN = 20
_MAX_TEXT = 300


def process_border(main: Callable[[], T]) -> Callable[[], T]:
    """`main`, with standard streams that are open; the machine's refusals are one line."""

    @functools.wraps(main)
    def guarded() -> T:
        _open_standard_streams()
        try:
            return main()
        except Exception as error:
            if (reason := refusal_of_the_machine(error)) is None:
                raise
            _end(reason)

    return guarded


def refusal_of_the_machine(error: BaseException) -> str | None:
    """What the machine or its limits refused, in one line; None if it was something else."""
    current: BaseException | None = error
    for _ in range(_MAX_CHAIN):
        if current is None:
            break
        text = " ".join(str(current).split())[:_MAX_TEXT]
        if isinstance(current, MemoryError) or (
            isinstance(current, OSError) and current.errno in _ERRNOS
        ):
            return f"{_LIMITS}: {text or type(current).__name__}"
        if isinstance(current, ImportError | OSError | RuntimeError) and any(
            part in text.lower() for part in _TEXTS
        ):
            return f"{_LIMITS}: {text}"
        if isinstance(current, BrokenPipeError):
            return f"standard output was closed: {text}"
        current = current.__cause__ or current.__context__
    return None


def _open_standard_streams() -> None:
    """Refuse a closed stdout; nothing else is opened in the place of stdin or stderr.

    A socket or a file that gets one of these numbers would be written to as if it were the log.
    """
    is_closed = [not _is_open(number) for number in range(3)]
    for _ in range(sum(is_closed)):
        os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
    if is_closed[1]:
        _end("standard output is closed: the log needs it (for none: >/dev/null)")


def _is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


def _end(reason: str) -> NoReturn:
    """Not by an exception: threads may wait for what will not come, and buffers for no reader."""
    path = Path(sys.argv[0])
    program = path.parent.name if path.name == "__main__.py" else path.name
    try:
        os.write(2, f"Error: {program}: {reason}\n".encode("utf-8", "backslashreplace"))
    finally:
        os._exit(1)
