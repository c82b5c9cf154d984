"""Starts and stops the children, and tells of their ends and of signals.

There is one queue of events, which the main thread reads: a thread of each child reports its end
(`child.py`), one more thread reads signals. Only the main thread starts children: the kernel's
parent-death signal is tied to the thread that forked.

    child's end, signals ─► events ─► Supervisor.next_event() in main
"""

import logging
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Self

from kagami_launcher.child import Child, ChildEnded, HeldOutput, LogStyle, Output

log = logging.getLogger(__name__)

# A call that never returns (a pipe that nobody reads, a file system that is gone) keeps the main
# thread from a signal; for so long it is waited for.
_PATIENCE_S = 10.0
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True, slots=True)
class StopAsked:
    """The launcher was signalled to stop."""

    signal: int


Event = ChildEnded | StopAsked


class Supervisor:
    """Owns the children and the queue of events. Leaving its scope kills whoever is left."""

    def __init__(self, output: Output) -> None:
        self._output = output
        self._events: SimpleQueue[Event] = SimpleQueue()
        self._backlog: deque[Event] = deque()
        self._children: list[Child] = []
        self._num_taken = 0  # times that the main thread took an event, or none

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
            watch = threading.Timer(_PATIENCE_S, self._end_if_stuck, (self._num_taken,))
            watch.daemon = True
            watch.start()

    def _end_if_stuck(self, num_taken: int) -> None:
        if self._num_taken == num_taken:
            self.__exit__()
            os._exit(1)

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
        try:
            if self._backlog:
                return self._backlog.popleft()
            return self._events.get(timeout=timeout_s)
        except Empty:
            return None
        finally:
            self._num_taken += 1

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
            self._num_taken += 1
            if event != ChildEnded(child):
                self._backlog.append(event)
