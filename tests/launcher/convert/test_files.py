"""What a conversion writes, and what lies in the way of it in a foreign folder."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.fakes.broken_files import mutants

from kagami_launcher.convert import files
from kagami_launcher.convert.files import (
    ConversionRefused,
    StoredTensor,
    only_one,
    open_safetensors,
    read_header,
    replaced,
    shown,
    write_safetensors,
)
from kagami_proto.model_files import BrokenFile


def zeros(name: str, num_bytes: int) -> StoredTensor:
    return StoredTensor(name, "U8", (num_bytes,), num_bytes, lambda: bytes(num_bytes))


def test_a_link_under_the_name_of_the_lock_is_not_emptied(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    (tmp_path / ".convert.lock").symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match=r"\.convert\.lock"), only_one(tmp_path):
        pass
    assert (tmp_path / "precious").read_text() == "mine"


def test_a_pipe_under_the_name_of_the_lock_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / ".convert.lock")
    with pytest.raises(ConversionRefused, match=r"\.convert\.lock is no file"), only_one(tmp_path):
        pass


def test_a_link_under_the_name_of_the_work_is_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    (tmp_path / ".out.safetensors.incomplete").symlink_to(tmp_path / "precious")
    with replaced(tmp_path / "out.safetensors") as work:
        write_safetensors(work, [zeros("a", 8)])
    assert (tmp_path / "precious").read_text() == "mine"
    assert load_file(tmp_path / "out.safetensors")["a"].tolist() == [0] * 8
    assert not (tmp_path / "out.safetensors").is_symlink()


def test_what_does_not_fit_on_the_disk_is_not_begun(tmp_path: Path) -> None:
    with pytest.raises(ConversionRefused, match=r"a\.safetensors takes 1152921504606846976 bytes"):
        write_safetensors(tmp_path / "a.safetensors", [zeros("a", 1 << 60)])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", [b"", b"\0" * 7, b"\xff" * 8, (1 << 40).to_bytes(8, "little")])
def test_a_header_that_lies_is_not_read(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises((ConversionRefused, BrokenFile), match=str(path)):
        read_header(path)


def test_every_mutant_of_a_header_is_refused_or_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.ones(2, 2), "b": torch.ones(3).half()}, path)
    good = path.read_bytes()
    for number, content in mutants(good, 500, header=len(good) - 22):
        path.write_bytes(content)
        try:
            header, begin = read_header(path)
        except (ConversionRefused, BrokenFile):
            continue
        ends = [entry["data_offsets"][1] for entry in header.values()]
        assert begin + max(ends, default=0) == len(content), number


def test_a_panic_of_the_library_is_a_refusal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class PanicException(BaseException):
        pass

    def panic(*_: object, **__: object) -> None:
        raise PanicException("index out of bounds")

    (tmp_path / "model.safetensors").write_bytes(bytes(16))
    monkeypatch.setattr(files, "safe_open", panic)
    with (
        pytest.raises(ConversionRefused, match="index out of bounds"),
        open_safetensors(tmp_path / "model.safetensors"),
    ):
        pass


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("a\nb", r"`a\nb`"),
        ("x" * 1000, f"`{'x' * 99}…"),
        (b"\xff", r"b'\xff'"),
        ([1] * 10**6, "a list of 1000000"),
        (2.5, "2.5"),
    ],
)
def test_what_is_shown_of_a_value_is_short(value: object, text: str) -> None:
    assert shown(value) == text
