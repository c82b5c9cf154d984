"""The small files of a model folder: whatever they hold, one error that names the file."""

import json
import os
from pathlib import Path

import pytest
from tests.fakes.broken_files import mutants

from kagami_proto import model_files
from kagami_proto.model_files import (
    BrokenFile,
    check_header,
    read_index,
    read_object,
    read_optional_object,
)


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "Expecting value"),
        (b"[]", "holds no JSON object"),
        (b'"text"', "holds no JSON object"),
        (b'{"a": }', "Expecting value"),
        (b"\xff\xfe{}", "can't decode byte 0xff"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b'{"a": 1' + b"0" * 5000 + b"}", "integer string"),
    ],
)
def test_what_is_no_object_is_refused_by_name(tmp_path: Path, content: bytes, why: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    for read in (read_object, read_optional_object):
        with pytest.raises(BrokenFile, match=why) as refusal:
            read(path)
        assert str(path) in str(refusal.value)


def test_a_long_file_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate(1 << 40)  # sparse
    with pytest.raises(BrokenFile, match="has 1099511627776 bytes, the limit is 16777216"):
        read_object(path)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(BrokenFile, match=r"config\.json: there is no such file"):
        read_object(tmp_path / "config.json")
    with pytest.raises(BrokenFile, match=r"config\.json: it is no regular file"):
        check_header(tmp_path / "config.json")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    assert read_optional_object(tmp_path / "a.json") == {}
    for name in ("a.json", "x" * 5000, "folder"):
        (tmp_path / "folder").mkdir(exist_ok=True)
        with pytest.raises(BrokenFile, match="cannot read"):
            read_object(tmp_path / name)


# --- the index ------------------------------------------------------------------------------------


def index(path: Path, value: object) -> Path:
    path.write_text(json.dumps(value))
    return path


def test_an_index_names_files_in_its_folder_and_below(tmp_path: Path) -> None:
    names = {"a": "model-1.safetensors", "b": "part/model-2.safetensors", "c": "…é"}
    path = index(tmp_path / "i.json", {"metadata": {"total_size": 1}, "weight_map": names})
    assert read_index(path) == names


@pytest.mark.parametrize(
    "name",
    ["", "/etc/passwd", "../a", "a/../../b", "..", "x" * 5000, "a/" * 5000 + "b", "a\0b", "é" * 200,
     "//a", "./../a"],
)  # fmt: skip
def test_a_name_outside_of_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    path = index(tmp_path / "i.json", {"weight_map": {"a": "fine.safetensors", "b": name}})
    with pytest.raises(BrokenFile, match="expected a file in the folder or below it") as refusal:
        read_index(path)
    assert len(str(refusal.value)) < 600


@pytest.mark.parametrize(
    "value",
    [{}, [], {"weight_map": {}}, {"weight_map": []}, {"weight_map": {"a": 3}},
     {"weight_map": {"a": None}}, {"weight_map": {"a": {"b": "c"}}}, {"weight_map": "a"}],
)  # fmt: skip
def test_an_index_of_another_shape_is_refused(tmp_path: Path, value: object) -> None:
    with pytest.raises(BrokenFile, match="weight_map"):
        read_index(index(tmp_path / "i.json", value))


@pytest.mark.parametrize(
    "content", [b"[" * 100_000, b'{"a":' * 100_000, b'{"weight_map":{"a":"\\ud800"}}', b"\xff"]
)
def test_an_index_that_is_no_json_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "i.json").write_bytes(content)
    with pytest.raises(BrokenFile, match=r"i\.json"):
        read_index(tmp_path / "i.json")


def test_a_million_files_are_too_many(tmp_path: Path) -> None:
    names = {str(number): f"{number}.safetensors" for number in range(1_000_000)}
    with pytest.raises(BrokenFile, match="names 1000000 files, the limit is 10000"):
        read_index(index(tmp_path / "i.json", {"weight_map": names}))


def test_every_mutant_of_an_index_is_refused_or_names_files_inside(tmp_path: Path) -> None:
    path = tmp_path / "i.json"
    good = json.dumps({"weight_map": {"a.b": "m-1.safetensors", "c": "../m"}}).encode()
    for number, content in mutants(good.replace(b"../", b"xx/"), 1000):
        path.write_bytes(content)
        try:
            found = read_index(path)
        except BrokenFile:
            continue
        for name in found.values():
            inside = os.path.normpath(tmp_path / name)
            assert inside.startswith(f"{tmp_path}/"), number


# --- safetensors ----------------------------------------------------------------------------------


def test_a_header_that_no_model_needs_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes((model_files.MAX_HEADER_BYTES).to_bytes(8, "little"))
    check_header(path)
    path.write_bytes(b"\xff" * 8)
    with pytest.raises(BrokenFile, match="header of 18446744073709551615 bytes, the limit is 3355"):
        check_header(path)
