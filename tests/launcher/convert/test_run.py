"""The conversion's process: whatever a file causes is one ERROR line and exit code 1."""

import logging
from pathlib import Path

import pytest
import torch
from tests.launcher.convert.test_pickles import make_folder

from kagami_launcher.convert import run
from kagami_launcher.convert.files import ConversionRefused
from kagami_launcher.convert.run import Task, convert
from kagami_proto import logs


class PanicException(BaseException):
    """As a Rust library's."""


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (ConversionRefused("tensor `a` is odd"), "tensor `a` is odd"),
        (ValueError("two\nlines"), "two lines"),
        (KeyError("a"), "KeyError: 'a'"),
        (MemoryError(), "MemoryError: "),
        (RecursionError("too deep"), "RecursionError: too deep (test_run.py:"),
        (ZeroDivisionError("division by zero"), "ZeroDivisionError: division by zero"),
        (PanicException("index out of bounds"), "a library failed: index out"),
        (TypeError("x" * 10_000), "TypeError: xxx"),
    ],
)
def test_whatever_is_raised_is_one_line(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
    error: BaseException,
    why: str,
) -> None:
    def fail(_: Task) -> None:
        raise error

    monkeypatch.setattr(logs, "configure", lambda *_, **__: None)
    monkeypatch.setattr(run, "convert", fail)
    caplog.set_level(logging.INFO)
    assert run.main([str(tmp_path), str(tmp_path)]) == 1
    (line,) = caplog.records
    assert (line.levelname, line.exc_info) == ("ERROR", None)
    assert line.getMessage().startswith(f"Cannot convert {tmp_path}: {why}")
    assert "\n" not in line.getMessage()
    assert len(line.getMessage()) < 1200


@pytest.mark.parametrize("ending", [KeyboardInterrupt, SystemExit])
def test_an_end_that_was_asked_for_is_none_of_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, ending: type[BaseException]
) -> None:
    def stop(_: Task) -> None:
        raise ending

    monkeypatch.setattr(logs, "configure", lambda *_, **__: None)
    monkeypatch.setattr(run, "convert", stop)
    with pytest.raises(ending):
        run.main([str(tmp_path), str(tmp_path)])


def test_a_side_file_of_terabytes_is_not_copied(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m", {"a": torch.ones(1)})
    with (folder / "vocab.json").open("wb") as file:
        file.truncate(1 << 40)  # sparse: a copy would be written out
    with pytest.raises(ConversionRefused, match=r"vocab\.json has 1099511627776 bytes, the limit"):
        convert(Task(folder, tmp_path / "hub" / "snapshots" / "key"))
    assert not (tmp_path / "hub" / "snapshots" / "key").exists()
