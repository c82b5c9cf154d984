"""Children: start them, forward every line they say, learn of their end, stop them.

There are threads and one queue. Each child has two threads that read its pipes and one that waits
for its end; one more thread reads signals. All of them put events into the queue, which the main
thread reads. Only the main thread starts children: the kernel's parent-death signal is tied to the
thread that forked.

    child stdout ─┐ a thread per pipe: whole lines, parsed, rank and target set ─► Output
    child stderr ─┘
    child's end, signals ─► events ─► Supervisor.next_event() in main
"""

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from queue import Empty, SimpleQueue
from typing import BinaryIO, Self

from kagami_proto import logs

log = logging.getLogger(__name__)

# Runs in place of the child and becomes it: dies with its parent from here on, also if the parent
# died before it could ask (PR_SET_PDEATHSIG = 1; exec keeps the setting).
_EXEC_TIED_TO_PARENT = (
    "import ctypes, os, signal, sys\n"
    "ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)\n"
    "if os.getppid() != int(sys.argv[1]): sys.exit(1)\n"
    "os.execv(sys.argv[2], sys.argv[2:])\n"
)
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# After a child's end its pipes may be held open by a process it left behind.
_PIPE_PATIENCE_S = 2.0


@dataclass(frozen=True, slots=True)
class ChildEnded:
    """A child's process is gone and all it said has been forwarded."""

    child: "Child"


@dataclass(frozen=True, slots=True)
class StopAsked:
    """The launcher was signalled to stop."""

    signal: int


Event = ChildEnded | StopAsked


class Output:
    """The launcher's stdout, shared by its own log and the forwarded lines; one write a line."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._lock = threading.Lock()

    def write(self, text: str, /) -> int:
        rest = memoryview(text.encode("utf-8", "backslashreplace"))
        with self._lock, suppress(OSError):  # a closed stdout is no reason to stop serving
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
        return len(text)

    def flush(self) -> None:
        """Nothing: every write goes out at once."""


class HeldOutput:
    """Holds what is written until `release`; after that it writes at once."""

    def __init__(self, output: Output) -> None:
        self._output = output
        self._held: list[str] | None = []
        self._lock = threading.Lock()

    @property
    def is_held(self) -> bool:
        return self._held is not None

    def write(self, text: str, /) -> int:
        with self._lock:
            if self._held is None:
                return self._output.write(text)
            self._held.append(text)
        return len(text)

    def release(self) -> None:
        """Write all that was held; a second call does nothing."""
        with self._lock:
            held, self._held = self._held, None
            for text in held or ():
                self._output.write(text)


@dataclass(frozen=True, slots=True)
class LogStyle:
    """How a child's lines appear in the launcher's log."""

    target: str
    level: int  # lines below it are dropped
    json_output: bool
    rank: int | None = None
    renames: bool = False  # parsed lines get `target` too


class Child:
    """One process in a group of its own, and the threads that listen to it."""

    def __init__(self, name: str, argv: Sequence[str], env: Mapping[str, str]) -> None:
        self.name = name
        self.exit_code: int | None = None
        self.last_error = ""  # the last ERROR line, else the last line of stderr
        self.has_connected = False  # the router said that it serves
        self.was_asked_to_end = False
        self._heard_error = False
        wrapper = [sys.executable, "-I", "-S", "-c", _EXEC_TIED_TO_PARENT, str(os.getpid())]
        self.process = subprocess.Popen(
            [*wrapper, *argv],
            env=dict(env),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            process_group=0,
        )

    @property
    def is_running(self) -> bool:
        return self.exit_code is None

    def listen(
        self, style: LogStyle, output: Output | HeldOutput, ended: Callable[[ChildEnded], None]
    ) -> None:
        """Forward the child's lines from now on; call `ended` when it is gone."""
        readers = [
            threading.Thread(
                target=self._forward, args=(pipe, is_error, style, output), daemon=True
            )
            for pipe, is_error in ((self.process.stdout, False), (self.process.stderr, True))
        ]
        for reader in readers:
            reader.start()

        def wait() -> None:
            code = self.process.wait()
            self.signal_group(signal.SIGKILL)  # what it started must not outlive it
            deadline = time.monotonic() + _PIPE_PATIENCE_S
            for reader in readers:
                reader.join(max(0.0, deadline - time.monotonic()))
            self.exit_code = code
            ended(ChildEnded(self))

        threading.Thread(target=wait, daemon=True).start()

    def _forward(
        self, pipe: BinaryIO, is_error: bool, style: LogStyle, output: Output | HeldOutput
    ) -> None:
        with pipe:
            for raw in pipe:
                text = raw.decode("utf-8", "backslashreplace").rstrip("\r\n")
                line = self._line(text, is_error, style)
                if logs.LEVELS.get(line.level.lower(), logging.INFO) >= style.level:
                    output.write((line.to_json() if style.json_output else line.to_text()) + "\n")

    def _line(self, text: str, is_error: bool, style: LogStyle) -> logs.LogLine:
        if line := logs.parse(text):
            if style.renames:
                line = replace(line, target=style.target)
            self.has_connected = self.has_connected or line.message == "Connected"
        else:
            level = "ERROR" if text.startswith("Error: ") else "WARN" if is_error else "INFO"
            line = logs.LogLine(logs.now(), level, style.target, text)
        self._remember_error(line, is_error)
        if style.rank is not None:
            line = replace(line, fields={**line.fields, "rank": style.rank})
        return line

    def _remember_error(self, line: logs.LogLine, is_error: bool) -> None:
        if not line.message.strip():
            return
        if line.level == "ERROR":
            self._heard_error = True
            self.last_error = line.message.strip().splitlines()[-1]
        elif is_error and not self._heard_error:
            self.last_error = line.message.strip()

    def terminate(self) -> None:
        """Ask the child to end."""
        self.was_asked_to_end = True
        with suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGTERM)

    def signal_group(self, number: int) -> None:
        """Signal the child and whatever it started."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, number)


class Supervisor:
    """Owns the children and the queue of events. Leaving its scope kills whoever is left."""

    def __init__(self, output: Output) -> None:
        self._output = output
        self._events: SimpleQueue[Event] = SimpleQueue()
        self._backlog: deque[Event] = deque()
        self._children: list[Child] = []
        self._is_stopping = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for child in self._children:
            if child.is_running:
                child.signal_group(signal.SIGKILL)

    @contextmanager
    def signals(self) -> Iterator[None]:
        """Turn the stop signals into events while the scope lasts; `nohup` is respected.

        The interpreter writes each signal into a pipe at once. A handler in Python would be too
        late: it runs between two steps of the main thread. If the signal comes right before the
        main thread begins to wait, or to another thread, the handler runs when the wait is over.
        """
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        listener = threading.Thread(target=self._hear, args=(reading,), daemon=True)
        listener.start()
        writing_before = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        before = {
            number: signal.signal(number, lambda *_: None)
            for number in _STOP_SIGNALS
            if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(writing_before)
            os.close(writing)
            listener.join()
            os.close(reading)

    def _hear(self, pipe: int) -> None:
        while numbers := os.read(pipe, 64):
            for number in numbers:
                self._events.put(StopAsked(number))

    def held_output(self) -> HeldOutput:
        """An output for a child whose lines have to wait until `release`."""
        return HeldOutput(self._output)

    def start(
        self,
        name: str,
        argv: Sequence[str],
        env: Mapping[str, str],
        style: LogStyle,
        output: HeldOutput | None = None,
    ) -> Child:
        """Start a child; raises OSError if that fails. Only the main thread may call this."""
        child = Child(name, argv, env)
        self._children.append(child)
        child.listen(style, output or self._output, self._events.put)
        return child

    def next_event(self, timeout_s: float | None) -> Event | None:
        """The next event, or None after the time."""
        if self._backlog:
            return self._backlog.popleft()
        try:
            return self._events.get(timeout=timeout_s)
        except Empty:
            return None

    def stop(self, children: Sequence[Child], grace_s: float) -> None:
        """End these children: SIGTERM, up to `grace_s` of patience, SIGKILL. Logs as TGI does.

        A second Ctrl-C ends the patience. Ends of other children stay in the queue.
        """
        waiting = [child for child in children if child.is_running]
        for child in waiting:
            log.info("Terminating %s", child.name)
            child.terminate()
            log.info("Waiting for %s to gracefully shutdown", child.name)
        deadline = time.monotonic() + grace_s
        of_others: list[Event] = []
        killed: set[Child] = set()
        while waiting:
            event = self.next_event(max(0.0, deadline - time.monotonic()) if not killed else None)
            match event:
                case ChildEnded(child) if child in waiting:
                    waiting.remove(child)
                    log.info("%s %s", child.name, "killed" if child in killed else "terminated")
                case ChildEnded():
                    of_others.append(event)
                case StopAsked(signal.SIGINT) | None:
                    for child in waiting:
                        log.info("Killing %s", child.name)
                        child.signal_group(signal.SIGKILL)
                        killed.add(child)
                case StopAsked():
                    pass
        self._backlog.extend(of_others)

    def kill(self, child: Child) -> None:
        """End a child at once and wait until it is gone; nothing is logged."""
        child.was_asked_to_end = True
        child.signal_group(signal.SIGKILL)
        while child.is_running:
            event = self._events.get()
            if event != ChildEnded(child):
                self._backlog.append(event)


def describe_end(child: Child) -> str:
    """How a child ended, in one phrase."""
    code = child.exit_code
    if code is not None and code < 0:
        phrase = f"was signaled to shutdown with signal {-code}"
        # A process that the kernel kills for memory can log nothing, so this line says it.
        return f"{phrase} (out of memory?)" if -code == signal.SIGKILL else phrase
    return f"ended with exit code {code}"


def exit_reason(child: Child) -> str:
    """Why a child failed: its last error line, or the signal that leaves no time for a line."""
    if child.exit_code == -signal.SIGKILL:
        return f"it {describe_end(child)}"
    return child.last_error
