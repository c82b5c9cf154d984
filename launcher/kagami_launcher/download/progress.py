"""How far a download is, for people: TGI's lines in a log, or one bar on a terminal."""

import logging
import os
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Protocol, Self, TextIO

from tqdm import tqdm

from kagami_launcher.download.files import RemoteFile

log = logging.getLogger(__name__)

_WORD_EVERY_S = 30.0  # a file of 5 GB takes minutes, and a silent log looks like a hang


class Progress(Protocol):
    """Every transfer reports to it from its own thread."""

    def start(self, file: RemoteFile) -> None: ...
    def advance(self, num_bytes: int) -> None: ...
    def finish(self, file: RemoteFile, path: Path, seconds: float) -> None: ...
    def close(self) -> None: ...


class Lines:
    """`Download file: …`, `Downloaded … in …`, `Download: [1/2] -- ETA: …`."""

    def __init__(self, num_files: int, num_bytes: int, clock: Callable[[], float]) -> None:
        self._num_files, self._num_bytes, self._clock = num_files, num_bytes, clock
        self._files_done = self._bytes_done = 0
        self._started = self._last_word = clock()
        self._lock = threading.Lock()

    def start(self, file: RemoteFile) -> None:
        log.info("Download file: %s", file.name)

    def advance(self, num_bytes: int) -> None:
        with self._lock:
            self._bytes_done += num_bytes
            if self._clock() - self._last_word < _WORD_EVERY_S:
                return
            self._last_word = self._clock()
        log.info(
            "Download: %.2f of %.2f GB -- ETA: %s",
            self._bytes_done / 1e9,
            self._num_bytes / 1e9,
            self._eta(),
        )

    def finish(self, file: RemoteFile, path: Path, seconds: float) -> None:
        with self._lock:
            self._files_done += 1
        log.info("Downloaded %s in %s.", path, timedelta(seconds=int(seconds)))
        log.info("Download: [%s/%s] -- ETA: %s", self._files_done, self._num_files, self._eta())

    def close(self) -> None:
        """Nothing is buffered."""

    def _eta(self) -> str:
        left = max(0, self._num_bytes - self._bytes_done)
        if self._files_done == self._num_files or not self._bytes_done:
            return "0" if not left or self._files_done == self._num_files else "unknown"
        elapsed = self._clock() - self._started
        return str(timedelta(seconds=int(elapsed * left / self._bytes_done)))


class Bar:
    """One bar over all files; it owns its line of the terminal, so there are no log lines."""

    def __init__(self, num_files: int, num_bytes: int, terminal: TextIO) -> None:
        self._terminal = terminal
        self._num_files, self._files_done = num_files, 0
        self._lock = threading.Lock()
        self._bar = tqdm(
            total=num_bytes,
            unit="B",
            unit_scale=True,
            file=terminal,
            ncols=os.get_terminal_size(terminal.fileno()).columns or 80,
            desc=f"Download [0/{num_files}]",
        )

    def start(self, file: RemoteFile) -> None:
        """Nothing: one bar stands for all files."""

    def advance(self, num_bytes: int) -> None:
        with self._lock:
            self._bar.update(num_bytes)

    def finish(self, file: RemoteFile, path: Path, seconds: float) -> None:
        with self._lock:
            self._files_done += 1
            self._bar.set_description(f"Download [{self._files_done}/{self._num_files}]")

    def close(self) -> None:
        self._bar.close()
        self._terminal.close()


def open_progress(num_files: int, num_bytes: int, *, draws_bars: bool) -> Progress:
    """The bar if it is wanted and there is a terminal, else the lines."""
    if draws_bars:
        try:
            terminal = Path("/dev/tty").open("w", encoding="utf-8")
        except OSError:
            pass
        else:
            return Bar(num_files, num_bytes, terminal)
    return Lines(num_files, num_bytes, time.monotonic)


class TransferBar:
    """What the library takes for a progress bar of one file; hands the bytes on."""

    def __init__(self, advance: Callable[[int], None]) -> None:
        self._advance = advance

    def __call__(self, *, initial: int = 0, **_: object) -> Self:
        """The library makes a bar of its `tqdm_class` for each transfer."""
        return self

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing to close: the bar is everybody's."""

    def update(self, num_bytes: int | float | None = 1) -> None:
        self._advance(int(num_bytes or 0))
