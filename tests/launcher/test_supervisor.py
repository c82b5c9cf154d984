"""Signals that come at a bad moment, and children that are killed."""

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Thread

import pytest

from kagami_launcher.child import Child, ChildEnded, LogStyle, Output
from kagami_launcher.supervisor import StopAsked, Supervisor


@pytest.fixture
def supervisor() -> Iterator[Supervisor]:
    """One whose children's lines go nowhere."""
    writer = os.open(os.devnull, os.O_WRONLY)
    with Supervisor(Output(writer)) as supervisor:
        yield supervisor
    os.close(writer)


def wait_until_asleep(thread: Thread) -> None:
    """Wait until the kernel says that the thread waits for something."""
    stat = Path(f"/proc/self/task/{thread.native_id}/stat")
    while stat.read_text().rpartition(")")[2].split()[0] != "S":
        time.sleep(0.001)


def test_a_signal_that_another_thread_gets_ends_the_wait(supervisor: Supervisor) -> None:
    def signal_itself() -> None:
        wait_until_asleep(threading.main_thread())
        signal.pthread_kill(threading.get_ident(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with supervisor.signals():
        thread = Thread(target=signal_itself)
        thread.start()
        event = supervisor.next_event(20.0)
        thread.join()
    assert event == StopAsked(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


def test_every_signal_is_heard_and_none_behind_the_scope(supervisor: Supervisor) -> None:
    with supervisor.signals():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
    heard = [supervisor.next_event(0.0) for _ in range(3)]
    assert heard == [StopAsked(signal.SIGINT), StopAsked(signal.SIGTERM), None]


def start(supervisor: Supervisor, *argv: str) -> Child:
    style = LogStyle("fake", logging.INFO, json_output=False)
    return supervisor.start("fake", argv, dict(os.environ), style)


def test_a_killed_child_is_gone_and_the_ends_of_others_are_not_lost(supervisor: Supervisor) -> None:
    other = start(supervisor, sys.executable, "-c", "")
    child = start(supervisor, sys.executable, "-c", "import threading; threading.Event().wait()")
    other.process.wait()
    supervisor.kill(child)
    assert child.exit_code == -signal.SIGKILL
    assert supervisor.next_event(20.0) == ChildEnded(other)


# A launcher whose main thread opens a pipe that nobody writes to.
STUCK = """
import os, shutil, sys
from kagami_launcher import supervisor
from kagami_launcher.child import LogStyle, Output

supervisor._PATIENCE_S = 0.1
with supervisor.Supervisor(Output(1)) as tree, tree.signals():
    style = LogStyle("fake", 20, json_output=False)
    child = tree.start("fake", [shutil.which("sleep"), "60"], dict(os.environ), style)
    print(child.process.pid, flush=True)
    os.open(sys.argv[1], os.O_RDONLY)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_launcher_that_is_stuck(tmp_path: Path, number: int) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    launcher = subprocess.Popen(
        [sys.executable, "-c", STUCK, str(pipe)], stdout=subprocess.PIPE, text=True
    )
    with launcher:
        assert launcher.stdout is not None
        child = int(launcher.stdout.readline())
        launcher.send_signal(number)
        assert launcher.wait(20) == 1
        deadline = time.monotonic() + 20
        while Path(f"/proc/{child}").exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert not Path(f"/proc/{child}").exists()
