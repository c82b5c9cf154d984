"""What systemd gets to know of this service: sd_notify(3), spoken directly.

    READY=1     requests are served
    STATUS=…    one line for `systemctl status`
    WATCHDOG=1  steps make progress, or there is no request and all processes answer
    EXTEND_TIMEOUT_USEC=…  the start goes on: a long start is not a start that hangs
    STOPPING=1

Without NOTIFY_SOCKET nothing is sent, and nothing is asked.
"""

import os
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

# Children must not speak for the service.
VARIABLES = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")
# How often `systemctl status` gets new numbers where no watchdog asks for more.
_STATUS_EVERY_S = 10.0
# A start that says nothing for this long hangs.
_PATIENCE_S = 60


@dataclass(frozen=True, slots=True)
class NotifySettings:
    """Where the service manager listens (None: there is none), and how often it wants to hear."""

    address: str | None = None
    watchdog_s: float | None = None

    @classmethod
    def of(cls, environ: Mapping[str, str], pid: int) -> "NotifySettings":
        """From the variables of sd_notify(3) and sd_watchdog_enabled(3)."""
        address = environ.get("NOTIFY_SOCKET")
        if not address or address[0] not in "/@":
            return cls()
        microseconds = environ.get("WATCHDOG_USEC", "")
        is_ours = environ.get("WATCHDOG_PID", str(pid)) == str(pid)
        if not is_ours or not microseconds.isdecimal() or not int(microseconds):
            return cls(address)
        return cls(address, int(microseconds) / 1e6)


class Notifier:
    """Sends datagrams, owns its socket. What cannot be sent is lost and ends nothing."""

    def __init__(self, settings: NotifySettings) -> None:
        self._socket: socket.socket | None = None
        self._watchdog_s = settings.watchdog_s
        self._next_beat = 0.0
        self._start_status = "Starting"
        if settings.address is not None:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            # A leading @ stands for the zero byte of Linux's abstract names.
            with suppress(OSError):
                self._socket.connect(settings.address.replace("@", "\0", 1))

    @property
    def is_on(self) -> bool:
        return self._socket is not None

    @property
    def wait_s(self) -> float | None:
        """Seconds until the next message is due; None: none is."""
        return max(0.0, self._next_beat - time.monotonic()) if self.is_on else None

    @property
    def is_due(self) -> bool:
        """Whether the next message is due."""
        return self.is_on and time.monotonic() >= self._next_beat

    def starting(self, what: str) -> None:
        """Say that the start goes on; `what` is the status that people read."""
        self._start_status = what
        patience = str(_PATIENCE_S * 1_000_000)
        self._send(STATUS=what, EXTEND_TIMEOUT_USEC=patience)
        self._next_beat = time.monotonic() + _PATIENCE_S / 3

    def still_starting(self) -> None:
        """Repeat the status of the start if the service manager is due a message."""
        if self.is_due:
            self.starting(self._start_status)

    def serving(self, what: str, *, is_ready: bool = False, is_alive: bool = True) -> None:
        """The service serves; the watchdog is fed only where it `is_alive`."""
        states = {"STATUS": what}
        if is_ready:
            states["READY"] = "1"
        if is_alive and self._watchdog_s is not None:
            states["WATCHDOG"] = "1"
        self._send(**states)
        every_s = min(_STATUS_EVERY_S, (self._watchdog_s or _STATUS_EVERY_S * 3) / 3)
        self._next_beat = time.monotonic() + every_s

    def stopping(self) -> None:
        """The service drains and ends."""
        self._send(STATUS="Stopping: running requests finish", STOPPING="1")

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _send(self, **states: str) -> None:
        if self._socket is None:
            return
        message = "\n".join(f"{name}={value}" for name, value in states.items())
        with suppress(OSError):
            self._socket.send(message.encode(), socket.MSG_DONTWAIT)


def own_settings(environ: Mapping[str, str]) -> NotifySettings:
    """The settings of this process."""
    return NotifySettings.of(environ, os.getpid())
