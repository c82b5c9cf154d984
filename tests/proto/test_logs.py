import errno
import io
import json
import logging
import re
from collections.abc import Iterator

import pytest

from kagami_proto import logs
from kagami_proto.logs import LogLine, level_of, parse

LINE = LogLine(
    "2024-05-31T05:53:53.041688Z",
    "INFO",
    "text_generation_launcher",
    "Starting shard",
    "shard-manager",
    {"rank": 0},
)


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    """What a configured process writes; the process's logging is put back afterwards."""
    root = logging.getLogger()
    names = ["kagami_proto", "kagami_router", "kagami_shard", "kagami_launcher"]
    handlers, levels = root.handlers[:], [logging.getLogger(name).level for name in names]
    root_level = root.level
    yield io.StringIO()
    logging.captureWarnings(False)
    root.handlers[:] = handlers
    root.setLevel(root_level)
    for name, level in zip(names, levels, strict=True):
        logging.getLogger(name).setLevel(level)


def test_text_has_tgis_form() -> None:
    assert LINE.to_text() == (
        "2024-05-31T05:53:53.041688Z  INFO shard-manager: text_generation_launcher: "
        "Starting shard rank=0"
    )


def test_text_quotes_values_with_spaces() -> None:
    line = LogLine("t", "WARN", "x", "m", fields={"a": "b c", "d": "", "e": 1.5})
    assert line.to_text() == 't  WARN x: m a="b c" d="" e=1.5'


def test_json_has_the_message_where_both_versions_put_it() -> None:
    body = json.loads(LINE.to_json())
    assert body["message"] == body["fields"]["message"] == "Starting shard"
    assert body["fields"]["rank"] == 0
    assert body["span"] == {"name": "shard-manager"}


@pytest.mark.parametrize("line", [LINE, LogLine("t", "ERROR", "x", "二\n行", fields={"a": [1]})])
def test_a_line_survives_the_pipe(line: LogLine) -> None:
    assert "\n" not in line.to_json()
    assert parse(line.to_json()) == line


@pytest.mark.parametrize(
    "text",
    [
        "",
        "plain",
        "{}",
        '{"timestamp":1}',
        '{"timestamp":"t","level":"INFO","target":"x","message":"m"',
        '{"timestamp":"t","level":"INFO","target":"x","message":"m","fields":[]}',
        '{"timestamp":"t","level":"INFO","target":"x","message":"m","fields":{},"span":"s"}',
    ],
)
def test_anything_else_is_no_line(text: str) -> None:
    assert parse(text) is None


@pytest.mark.parametrize(
    ("text", "level"),
    [
        ("info", logging.INFO),
        ("WARN", logging.WARNING),
        ("text_generation_router=debug,h2=off", logging.DEBUG),
        ("error,text_generation_launcher=debug", logging.ERROR),
        ("off", logging.CRITICAL + 1),
        ("nonsense", logging.INFO),
        ("", logging.INFO),
    ],
)
def test_a_level_is_read_as_tgi_reads_it(text: str, level: int) -> None:
    assert level_of(text, "text_generation_router") == level


def test_a_log_record_becomes_a_line(stream: io.StringIO) -> None:
    logs.configure("text_generation_router", level="info", json_output=False, stream=stream)
    log = logging.getLogger("kagami_router.serving.infer")
    log.info("Success", extra={"total_time": "1ms", "span": "generate"})
    log.debug("unheard")
    logging.getLogger("somebody.else").info("unheard")
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z  INFO generate: text_generation_router: "
        r"Success total_time=1ms\n",
        stream.getvalue(),
    )


def test_an_exception_brings_its_traceback(stream: io.StringIO) -> None:
    logs.configure("x", level="info", json_output=True, stream=stream)
    try:
        raise ValueError("no")
    except ValueError:
        logging.getLogger("kagami_shard").exception("Error when initializing model")
    line = parse(stream.getvalue().strip())
    assert line is not None
    assert line.level == "ERROR"
    assert line.message.startswith("Error when initializing model\n    Traceback ")
    assert line.message.endswith("ValueError: no")


FORGED = "2024-05-31T05:53:53.041688Z ERROR text_generation_launcher: forged"


@pytest.mark.parametrize(
    "unsafe",
    ["\n", "\r", "\x1b[2J", "\x85", "\x9b", "\u2028", "\u202e", "\u2067", "\x00", "\ud800"],
)
@pytest.mark.parametrize("place", ["message", "field", "exception", "span"])
@pytest.mark.parametrize("json_output", [False, True])
def test_no_text_forges_a_line_or_reaches_a_terminal(
    stream: io.StringIO, unsafe: str, place: str, json_output: bool
) -> None:
    text = f"a{unsafe}{FORGED}"
    logs.configure("x", level="info", json_output=json_output, stream=stream)
    log = logging.getLogger("kagami_router")
    match place:
        case "message":
            log.warning("no tool of type %s", text)
        case "exception":
            log.error("Internal error", exc_info=ValueError(text))
        case _:
            log.warning("m", extra={"span" if place == "span" else "model": text})
    written = stream.getvalue()
    assert unsafe[0] not in written.replace("\n", "") or unsafe == "\n"
    lines = written.splitlines()
    assert all(line.startswith("    ") for line in lines[1:])
    if json_output:
        assert len(lines) == 1
        assert parse(lines[0]) is not None
    written.encode()


def test_a_long_text_is_cut_and_its_length_named() -> None:
    line = LogLine("t", "WARN", "x", "m" * 10**6, fields={"a": "b" * 10**6, "c": ["d" * 10**6]})
    for written in (line.to_text(), line.to_json()):
        assert len(written) < 10**5
        assert "… (1000000 characters)" in written
    forwarded = parse(line.to_json())
    assert forwarded is not None
    assert parse(forwarded.to_json()) == forwarded


class _FullDisk(io.StringIO):
    def write(self, text: str, /) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.usefixtures("stream")
def test_a_full_disk_under_the_log_is_no_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("test", level="info", json_output=False, stream=_FullDisk())
    logging.getLogger("kagami_router").error("lost")
    assert capsys.readouterr().err == ""
