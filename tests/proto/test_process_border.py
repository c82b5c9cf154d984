"""What a machine refuses is one line and exit code 1; a bug keeps its traceback."""

import errno
import subprocess
import sys

import pytest

from kagami_proto.process_border import refusal_of_the_machine

MAIN = """
import errno, os, sys
from kagami_proto.process_border import process_border

@process_border
def main():
    {body}

sys.exit(main())
"""


def run(body: str, *, closed: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["sh", "-c", f'exec "$0" -c "$1" {closed}', sys.executable, MAIN.format(body=body)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("raise MemoryError", "MemoryError"),
        ("raise MemoryError('of 8 bytes\\\\nand more')", "of 8 bytes and more"),
        ("raise OSError(errno.EMFILE, 'Too many open files')", "Too many open files"),
        ("raise BlockingIOError(errno.EAGAIN, 'fork')", "fork"),
        ('raise RuntimeError("can\'t start new thread")', "can't start new thread"),
        ("raise ImportError('a.so: failed to map segment from shared object')", "a.so: failed"),
        ("raise BrokenPipeError(errno.EPIPE, 'Broken pipe')", "standard output was closed"),
    ],
)
def test_what_the_machine_refuses_is_one_line(body: str, why: str) -> None:
    ended = run(body.replace("\\\\", "\\"))
    assert ended.returncode == 1
    assert ended.stderr.startswith("Error: ")
    assert why in ended.stderr
    assert ended.stderr.count("\n") == 1


def test_the_reason_is_found_behind_what_was_raised_for_it() -> None:
    outer = ImportError("the library says only that it cannot be imported")
    outer.__cause__ = OSError(errno.ENOMEM, "Cannot allocate memory")
    assert "Cannot allocate memory" in (refusal_of_the_machine(outer) or "")
    outer.__cause__ = outer
    assert refusal_of_the_machine(outer) is None


@pytest.mark.parametrize("body", ["1 / 0", "raise OSError(errno.ENOENT, 'none')", "{}['a']"])
def test_a_bug_keeps_its_traceback(body: str) -> None:
    ended = run(body)
    assert ended.returncode == 1
    assert ended.stderr.startswith("Traceback")


def test_a_closed_stdout_is_one_line() -> None:
    for closed in (">&-", ">&- <&-"):
        ended = run("return 0", closed=closed)
        assert ended.returncode == 1
        assert "standard output is closed" in ended.stderr
        assert ended.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "part",
    [
        *("kagami_launcher", "kagami_router", "kagami_shard"),
        *("kagami_launcher.download", "kagami_launcher.convert"),
    ],
)
def test_each_process_has_the_border(part: str) -> None:
    ended = subprocess.run(
        ["sh", "-c", f'exec "$0" -m {part} >&-', sys.executable],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ended.returncode == 1
    assert ended.stderr == (
        f"Error: {part.rpartition('.')[2]}: standard output is closed: the log needs it "
        "(for none: >/dev/null)\n"
    )


def test_no_file_gets_the_number_of_a_closed_stream() -> None:
    for closed in ("2>&-", "<&-", "<&- 2>&-"):
        ended = run("print(os.open(os.devnull, os.O_RDONLY))", closed=closed)
        assert ended.returncode == 0
        assert int(ended.stdout) > 2
