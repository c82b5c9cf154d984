"""One child process: every line it says is forwarded, and its end is reported.

Two threads read its pipes and one waits for its end.

    child stdout ─┐ a thread per pipe: whole lines, parsed, rank and target set ─► Output
    child stderr ─┘
"""

import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import BinaryIO

from kagami_proto import logs

# Runs in place of the child and becomes it: dies with its parent from here on, also if the parent
# died before it could ask (PR_SET_PDEATHSIG = 1; exec keeps the setting).
_EXEC_TIED_TO_PARENT = (
    "import ctypes, os, signal, sys\n"
    "ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)\n"
    "if os.getppid() != int(sys.argv[1]): sys.exit(1)\n"
    "os.execv(sys.argv[2], sys.argv[2:])\n"
)
# After a child's end its pipes may be held open by a process it left behind.
_PIPE_PATIENCE_S = 2.0


@dataclass(frozen=True, slots=True)
class ChildEnded:
    """A child's process is gone and all it said has been forwarded."""

    child: "Child"


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
