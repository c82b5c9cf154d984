"""Takes finished spans to an exporter; those who end spans never wait.

The SDK's own batch processor drops the oldest span of a full queue, writes a line for each, and
does not count them. This one refuses the newest, counts, and logs once that something is wrong.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

from opentelemetry.context import Context
from opentelemetry.sdk.trace import ReadableSpan, Span, SpanProcessor
from opentelemetry.sdk.trace.export import SpanExporter, SpanExportResult

logger = logging.getLogger(__name__)

# Of the specification's "Batch Span Processor".
_DEFAULT_QUEUE, _DEFAULT_BATCH, _DEFAULT_DELAY_MS = 2048, 512, 5000
# A collector that stalls may hold up the end of a process for this long, and no longer.
CLOSE_TIMEOUT_S = 1.0


@dataclass(frozen=True, slots=True)
class BatchLimits:
    """Most spans in the queue, most spans in one export, and seconds between two exports."""

    queue: int = _DEFAULT_QUEUE
    batch: int = _DEFAULT_BATCH
    delay_s: float = _DEFAULT_DELAY_MS / 1e3

    @classmethod
    def of(cls, environ: Mapping[str, str]) -> "BatchLimits":
        """From OTEL_BSP_*; raises `ValueError` that names the variable."""
        queue = _number(environ, "OTEL_BSP_MAX_QUEUE_SIZE", _DEFAULT_QUEUE)
        batch = _number(environ, "OTEL_BSP_MAX_EXPORT_BATCH_SIZE", _DEFAULT_BATCH)
        delay_ms = _number(environ, "OTEL_BSP_SCHEDULE_DELAY", _DEFAULT_DELAY_MS)
        return cls(queue, min(batch, queue), delay_ms / 1e3)


def _number(environ: Mapping[str, str], name: str, default: int) -> int:
    text = environ.get(name) or str(default)
    if not text.isascii() or not text.isdecimal() or int(text) < 1:
        raise ValueError(f"{name} must be a whole number > 0. Given: {text!r}")
    return int(text)


class SpanExport(SpanProcessor):
    """A bounded queue and the one thread that empties it.

    `dropped` counts the spans that no collector has seen: the queue was full, or the export failed.
    """

    def __init__(self, exporter: SpanExporter, endpoint: str, limits: BatchLimits) -> None:
        self._exporter = exporter
        self._endpoint = endpoint
        self._limits = limits
        self._queue: deque[ReadableSpan] = deque()
        self._refused = 0  # written by whoever ends spans, under `_lock`
        self._failed = 0  # written by the thread alone
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._is_closing = False
        self._is_failing = False
        self._last_warning = _LastWarning()
        self._thread = threading.Thread(target=self._run, name="export spans", daemon=True)
        self._thread.start()

    @property
    def dropped(self) -> int:
        """Spans lost until now."""
        return self._refused + self._failed

    def on_start(self, span: Span, parent_context: Context | None = None) -> None:
        """Nothing: only finished spans count."""

    def on_end(self, span: ReadableSpan) -> None:
        """Queue a finished span, or count it as dropped."""
        with self._lock:
            if self._is_closing or len(self._queue) >= self._limits.queue:
                self._refused += 1
                return
            self._queue.append(span)
            is_batch = len(self._queue) >= self._limits.batch
        if is_batch:
            self._wake.set()

    def shutdown(self) -> None:
        """Export what is queued, for `CLOSE_TIMEOUT_S` at most."""
        with self._lock:
            if self._is_closing:
                return
            self._is_closing = True
        self._wake.set()
        self._thread.join(CLOSE_TIMEOUT_S)
        if self._thread.is_alive():
            # A thread of its own: an exporter may wait for the export that hangs.
            threading.Thread(target=self._exporter.shutdown, daemon=True).start()
        else:
            self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        """Wait until the queue is empty; whether it is."""
        until = time.monotonic() + timeout_millis / 1e3
        self._wake.set()
        while self._queue and time.monotonic() < until:
            time.sleep(0.01)
        return not self._queue

    def _run(self) -> None:
        with self._last_warning:
            while not self._is_closing:
                self._wake.wait(self._limits.delay_s)
                self._wake.clear()
                self._export_all()
            self._export_all()

    def _export_all(self) -> None:
        while self._queue:
            with self._lock:
                count = min(len(self._queue), self._limits.batch)
                batch = [self._queue.popleft() for _ in range(count)]
            self._export(batch)

    def _export(self, batch: list[ReadableSpan]) -> None:
        self._last_warning.text = ""
        try:
            is_there = self._exporter.export(batch) is SpanExportResult.SUCCESS
        # A border: whatever an exporter raises costs these spans and nothing else.
        except Exception as error:
            self._last_warning.text = f"{type(error).__name__}: {error}"
            is_there = False
        if not is_there:
            self._failed += len(batch)
        if is_there is self._is_failing:
            self._report(is_there)

    def _report(self, is_there: bool) -> None:
        """One line when exports begin to fail, and one when they work again."""
        self._is_failing = not is_there
        if is_there:
            logger.info("Traces are exported again", extra={"endpoint": self._endpoint})
        else:
            logger.warning(
                "Traces cannot be exported: spans are dropped and counted until they can",
                extra={"endpoint": self._endpoint, "reason": self._last_warning.text or "refused"},
            )


class _LastWarning(logging.Handler):
    """Remembers the exporters' last warning, instead of a log line for each export.

    A context manager: inside it, OpenTelemetry's loggers write to this handler alone.
    """

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.text = ""
        self._logger = logging.getLogger("opentelemetry")

    def __enter__(self) -> "_LastWarning":
        self._logger.addHandler(self)
        self._logger.propagate = False
        return self

    def __exit__(self, *_: object) -> None:
        self._logger.removeHandler(self)
        self._logger.propagate = True

    def emit(self, record: logging.LogRecord) -> None:
        # The warning of a retry names the cause, the last one does not: the longest says most.
        self.text = max(self.text, " ".join(record.getMessage().split())[:400], key=len)
