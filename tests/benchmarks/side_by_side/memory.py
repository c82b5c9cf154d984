"""The peak of each server's memory, watched by a thread."""

import threading
import time
from types import TracebackType

from tests.benchmarks.side_by_side import processes

INTERVAL_S = 0.2
# A look at all processes takes 2 ms from what is measured; servers that have started grow slowly.
_CALM_INTERVAL_S, _CALM_AFTER_S = 1.0, 60.0
# The exact figure makes the kernel walk all pages, which would slow down what is measured: it is
# only taken when the cheap one says that there is a new peak.
_GROWTH = 1.01


class PeakMemory:
    """Watches servers from their start on; one `with` for all of them."""

    def __init__(self) -> None:
        self._peaks: dict[int, int] = {}
        self._resident: dict[int, int] = {}
        self._last_start = 0.0
        self._stopped = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "PeakMemory":
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._stopped.set()
        self._thread.join()

    def add(self, session: int) -> None:
        """Watch the processes of a session."""
        with self._lock:
            self._peaks[session] = self._resident[session] = 0
            self._last_start = time.monotonic()

    def peak(self, session: int) -> int:
        """Bytes at the highest until now."""
        self._look()
        return self._peaks[session]

    def drop(self, session: int) -> None:
        """Do not watch it any more."""
        with self._lock:
            del self._peaks[session], self._resident[session]

    def _watch(self) -> None:
        while not self._stopped.wait(self._interval_s()):
            self._look()

    def _interval_s(self) -> float:
        is_calm = time.monotonic() - self._last_start > _CALM_AFTER_S
        return _CALM_INTERVAL_S if is_calm else INTERVAL_S

    def _look(self) -> None:
        with self._lock:
            found = processes.sessions() if self._peaks else {}
            for session in self._peaks:
                pids = found.get(session, ())
                resident = processes.resident_bytes(pids)
                if resident > _GROWTH * self._resident[session]:
                    self._resident[session] = resident
                    exact = processes.proportional_bytes(pids)
                    self._peaks[session] = max(self._peaks[session], exact)
