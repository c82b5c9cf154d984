"""The lines of a child that are held until its time has come."""

import os
from collections.abc import Iterator
from threading import Thread

import pytest

from kagami_launcher.child import HeldOutput, Output


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
