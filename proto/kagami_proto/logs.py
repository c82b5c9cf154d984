"""One log line, as JSON between processes and as text for people.

Children write JSON lines; the launcher reads them and writes every line of the tree in one of two
forms, both of which TGI's operators know:

    2024-05-31T05:53:53.041688Z  INFO shard-manager: text_generation_launcher: Shard ready rank=0
    {"timestamp":"…Z","level":"INFO","target":"…","message":"…","fields":{"message":"…",…},"span":{…}}

Values given through `extra=` become `key=value` behind the text and members of `fields`; the key
`span` (a name such as "download") stands before the target. A line about a request
(`request_id`) that is traced ends with its `trace_id`.

Texts may come from clients and from model files. So every text is bounded, and what could forge a
line, move a terminal's cursor or turn the direction of writing is escaped, here and nowhere else.
A message has the line breaks of its format string only, and the lines of a traceback are indented:
nothing but a real line begins with a time.
"""

import json
import logging
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Protocol

from kagami_proto.tracing import current_trace_id

LEVELS: Mapping[str, int] = {
    "trace": logging.DEBUG,
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warn": logging.WARNING,
    "warning": logging.WARNING,
    "error": logging.ERROR,
    "off": logging.CRITICAL + 1,
}

_LEVEL_NAMES = {"WARNING": "WARN", "CRITICAL": "ERROR"}
# What every LogRecord has; the rest of its __dict__ came through `extra=`.
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
# Characters of a field, and of a message with its traceback.
MAX_FIELD = 4096
MAX_MESSAGE = 32_768
# Control characters (C0 and C1: line breaks, ESC), Unicode's line ends, marks that change the
# direction of writing (UAX #9, section 2), and halves of surrogate pairs, which no encoding has.
_UNSAFE = re.compile(
    r"[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
)
_CUT = re.compile(r"… \(\d{1,15} characters\)")
_SHORT = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}
_CONTINUES = "\n    "


@dataclass(frozen=True, slots=True)
class LogLine:
    """One event: time (UTC, microseconds), level, source, text."""

    timestamp: str
    level: str
    target: str
    message: str
    span: str = ""
    fields: Mapping[str, object] = field(default_factory=dict)

    def to_text(self) -> str:
        span = f"{_escaped(self.span)}: " if self.span else ""
        tail = "".join(f" {key}={_plain(value)}" for key, value in self.fields.items())
        message = "\n".join(map(_escaped, _bounded(self.message, MAX_MESSAGE).split("\n")))
        return f"{self.timestamp} {self.level:>5} {span}{self.target}: {message}{tail}"

    def to_json(self) -> str:
        message = _bounded(self.message, MAX_MESSAGE)
        fields = {key: _bounded_value(value) for key, value in self.fields.items()}
        body: dict[str, object] = {
            "timestamp": self.timestamp,
            "level": self.level,
            "target": self.target,
            "message": message,
            "fields": {"message": message, **fields},
        }
        if self.span:
            body["span"] = {"name": self.span}
        return _json(body)


def _json(value: object) -> str:
    """On one line, with everything unsafe as `\\uXXXX`; such characters stand in strings only."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), default=str)
    return _UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def _escaped(text: str) -> str:
    return _UNSAFE.sub(lambda found: _SHORT.get(found[0]) or f"\\u{ord(found[0]):04x}", text)


def _on_one_line(argument: object) -> object:
    """A log call's argument; what is no number as text without line breaks."""
    return argument if isinstance(argument, int | float) else _escaped(str(argument))


def _bounded(text: str, limit: int) -> str:
    """`text` cut to `limit`; one that another process cut stays as it is."""
    is_short = len(text) <= limit or _CUT.fullmatch(text, limit)
    return text if is_short else f"{text[:limit]}… ({len(text)} characters)"


def _bounded_value(value: object) -> object:
    """A number as it is; what holds text as text if it is too long."""
    if isinstance(value, int | float | None):
        return value
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return value if len(text) <= MAX_FIELD else _bounded(text, MAX_FIELD)


def _plain(value: object) -> str:
    text = _bounded(str(value), MAX_FIELD)
    return _json(text) if re.search(r"\s", text) or not text else _escaped(text)


def parse(line: str) -> LogLine | None:
    """Read a line that a child wrote with `to_json`; None if it is anything else."""
    if not line.startswith('{"timestamp":'):
        return None
    try:
        body = json.loads(line)
        fields = {key: value for key, value in body["fields"].items() if key != "message"}
        span = body.get("span", {}).get("name", "")
        return LogLine(
            body["timestamp"], body["level"], body["target"], body["message"], span, fields
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def now() -> str:
    """The present in UTC as a log line writes it."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


class _Formatter(logging.Formatter):
    def __init__(self, target: str, json_output: bool) -> None:
        super().__init__()
        self._target = target
        self._json_output = json_output

    def format(self, record: logging.LogRecord) -> str:
        extra = {key: value for key, value in vars(record).items() if key not in _STANDARD}
        if "request_id" in extra and (trace_id := current_trace_id()):
            extra["trace_id"] = trace_id
        message = record.getMessage()
        if isinstance(record.args, tuple) and record.args:
            message = str(record.msg) % tuple(map(_on_one_line, record.args))
        if record.exc_info:
            lines = [message, *self.formatException(record.exc_info).splitlines()]
            message = _CONTINUES.join(lines)
        line = LogLine(
            timestamp=datetime.fromtimestamp(record.created, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
            level=_LEVEL_NAMES.get(record.levelname, record.levelname),
            target=self._target,
            message=message,
            span=str(extra.pop("span", "")),
            fields=extra,
        )
        return line.to_json() if self._json_output else line.to_text()


class LineSink(Protocol):
    """Where lines go: a text stream, or the launcher's stdout that many threads share."""

    def write(self, text: str, /) -> object: ...

    def flush(self) -> object: ...


class _Handler(logging.StreamHandler[LineSink]):
    def handleError(self, record: logging.LogRecord) -> None:
        """A full disk or a reader that is gone is no reason for a traceback at each line."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


def configure(
    target: str, *, level: str, json_output: bool, stream: LineSink | None = None
) -> None:
    """Send this process's log to `stream` (default: stdout), one line per event.

    `level` is a LOG_LEVEL value (`info`, `warn`, …); for a filter expression such as
    `text_generation_router=debug,h2=off` the last plain or matching level counts.
    """
    handler = _Handler(stream or sys.stdout)
    handler.setFormatter(_Formatter(target, json_output))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)  # libraries log only when something is wrong
    logging.getLogger("kagami_proto").setLevel(level_of(level, target))
    for package in ("kagami_router", "kagami_shard", "kagami_launcher"):
        logging.getLogger(package).setLevel(level_of(level, target))
    logging.captureWarnings(True)


def level_of(text: str, target: str) -> int:
    """The numeric level that a LOG_LEVEL text means for `target`; INFO if it says nothing."""
    level = logging.INFO
    for part in text.lower().split(","):
        name, _, value = part.strip().rpartition("=")
        if not name or target.startswith(name):
            level = LEVELS.get(value, level)
    return level
