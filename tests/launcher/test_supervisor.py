"""What a child says before anybody shall hear it, and signals that come at a bad moment."""

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Thread

import pytest

from kagami_launcher.supervisor import (
    Child,
    ChildEnded,
    HeldOutput,
    LogStyle,
    Output,
    StopAsked,
    Supervisor,
)


class Pipe:
    """An output, and what has come out of it until now."""

    def __init__(self, reader: int, writer: int) -> None:
        self._reader = reader
        self.output = Output(writer)

    def heard(self) -> str:
        try:
            return os.read(self._reader, 65_536).decode()
        except BlockingIOError:
            return ""


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    yield Pipe(reader, writer)
    os.close(reader)
    os.close(writer)


def test_nothing_is_heard_before_the_release(pipe: Pipe) -> None:
    held = HeldOutput(pipe.output)
    assert held.write("one\n") == 4
    assert held.is_held
    assert pipe.heard() == ""


def test_the_release_says_what_was_held_in_order_and_once(pipe: Pipe) -> None:
    held = HeldOutput(pipe.output)
    for line in ("one\n", "two\n"):
        held.write(line)
    held.release()
    held.release()
    assert pipe.heard() == "one\ntwo\n"


def test_what_is_written_behind_the_release_is_heard_at_once(pipe: Pipe) -> None:
    held = HeldOutput(pipe.output)
    held.release()
    held.write("three\n")
    assert not held.is_held
    assert pipe.heard() == "three\n"


def test_no_line_is_lost_or_passed_by_while_it_is_released(pipe: Pipe) -> None:
    held = HeldOutput(pipe.output)
    writer = Thread(target=lambda: [held.write(f"{number}\n") for number in range(2000)])
    writer.start()
    held.release()
    writer.join()
    assert pipe.heard().split() == [str(number) for number in range(2000)]


def wait_until_asleep(thread: Thread) -> None:
    """Wait until the kernel says that the thread waits for something."""
    stat = Path(f"/proc/self/task/{thread.native_id}/stat")
    while stat.read_text().rpartition(")")[2].split()[0] != "S":
        time.sleep(0.001)


def test_a_signal_that_another_thread_gets_ends_the_wait(pipe: Pipe) -> None:
    def signal_itself() -> None:
        wait_until_asleep(threading.main_thread())
        signal.pthread_kill(threading.get_ident(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    supervisor = Supervisor(pipe.output)
    with supervisor.signals():
        thread = Thread(target=signal_itself)
        thread.start()
        event = supervisor.next_event(20.0)
        thread.join()
    assert event == StopAsked(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


def test_every_signal_is_heard_and_none_behind_the_scope(pipe: Pipe) -> None:
    supervisor = Supervisor(pipe.output)
    with supervisor.signals():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
    heard = [supervisor.next_event(0.0) for _ in range(3)]
    assert heard == [StopAsked(signal.SIGINT), StopAsked(signal.SIGTERM), None]


def start(supervisor: Supervisor, *argv: str) -> Child:
    style = LogStyle("fake", logging.INFO, json_output=False)
    return supervisor.start("fake", argv, dict(os.environ), style)


def test_a_killed_child_is_gone_and_the_ends_of_others_are_not_lost(pipe: Pipe) -> None:
    with Supervisor(pipe.output) as supervisor:
        other = start(supervisor, sys.executable, "-c", "")
        child = start(
            supervisor, sys.executable, "-c", "import threading; threading.Event().wait()"
        )
        other.process.wait()
        supervisor.kill(child)
        assert child.exit_code == -signal.SIGKILL
        assert supervisor.next_event(20.0) == ChildEnded(other)
