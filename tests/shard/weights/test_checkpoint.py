import json
import os
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tests.fakes.broken_files import mutants

from kagami_proto.errors import InvalidCheckpoint
from kagami_shard.weights.checkpoint import INDEX, Checkpoint, weight_files

CPU = torch.device("cpu")
A = torch.arange(6.0).view(2, 3)
B = torch.arange(12.0).view(4, 3) + 10


def test_a_tensor_is_cast_and_copied(tmp_path: Path) -> None:
    save_file({"a": A}, tmp_path / "model.safetensors")
    with Checkpoint(tmp_path) as checkpoint:
        loaded = checkpoint.load("a", dtype=torch.bfloat16, device=CPU)
    assert torch.equal(loaded, A.bfloat16())


def test_rows_of_several_files_land_in_one_tensor(tmp_path: Path) -> None:
    save_file({"a": A}, tmp_path / "one.safetensors")
    save_file({"b": B}, tmp_path / "two.safetensors")
    with Checkpoint(tmp_path) as checkpoint:
        loaded = checkpoint.load_rows(["b", "a"], dtype=torch.float32, device=CPU)
    assert torch.equal(loaded, torch.cat([B, A]))


def test_vectors_are_joined_too(tmp_path: Path) -> None:
    save_file({"a": A[0].clone(), "b": B[0].clone()}, tmp_path / "model.safetensors")
    with Checkpoint(tmp_path) as checkpoint:
        loaded = checkpoint.load_rows(["a", "b"], dtype=torch.float32, device=CPU)
    assert torch.equal(loaded, torch.cat([A[0], B[0]]))


def test_bytes_are_counted_as_stored(tmp_path: Path) -> None:
    save_file({"a": A.half(), "b": B}, tmp_path / "model.safetensors")
    with Checkpoint(tmp_path) as checkpoint:
        checkpoint.load("a", dtype=torch.float32, device=CPU)
        assert checkpoint.bytes_loaded == 12


def test_the_index_says_which_files_count(tmp_path: Path) -> None:
    save_file({"a": A}, tmp_path / "model-00001-of-00001.safetensors")
    save_file({"a": A}, tmp_path / "leftover.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00001.safetensors"}}
    (tmp_path / INDEX).write_text(json.dumps(index))
    assert weight_files(tmp_path) == [tmp_path / "model-00001-of-00001.safetensors"]


def test_the_original_format_and_adapters_are_left_out(tmp_path: Path) -> None:
    for name in ("model", "consolidated", "adapter_model"):
        save_file({"a": A}, tmp_path / f"{name}.safetensors")
    assert weight_files(tmp_path) == [tmp_path / "model.safetensors"]


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    save_file({"a": A}, tmp_path / "model.safetensors")
    with (
        Checkpoint(tmp_path) as checkpoint,
        pytest.raises(InvalidCheckpoint, match=r"^weight b does not exist in "),
    ):
        checkpoint.load("b", dtype=torch.float32, device=CPU)


def test_a_key_in_two_files_is_named_with_both(tmp_path: Path) -> None:
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    for file in (one, two):
        save_file({"a": A}, file)
    message = f"Key a was found in multiple files: {one} and {two}"
    with pytest.raises(InvalidCheckpoint, match=re.escape(message)):
        Checkpoint(tmp_path)


def test_parts_that_do_not_fit_are_named(tmp_path: Path) -> None:
    save_file({"a": A, "b": torch.zeros(2, 5)}, tmp_path / "model.safetensors")
    with (
        Checkpoint(tmp_path) as checkpoint,
        pytest.raises(InvalidCheckpoint, match=r"weights a, b do not fit together.*\(2, 5\)"),
    ):
        checkpoint.load_rows(["a", "b"], dtype=torch.float32, device=CPU)


def test_a_folder_without_weights_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidCheckpoint, match=re.escape(f"{tmp_path} has no weights")):
        Checkpoint(tmp_path)


def test_a_file_missing_from_the_index_is_named(tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text('{"weight_map": {"a": "gone.safetensors"}}')
    with pytest.raises(InvalidCheckpoint, match=r"gone\.safetensors does not exist"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "x" * 5000])
def test_an_index_does_not_lead_out_of_the_folder(tmp_path: Path, name: str) -> None:
    save_file({"a": A}, tmp_path / "outside.safetensors")
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(InvalidCheckpoint, match="expected a file in the folder"):
        Checkpoint(tmp_path / "m")


@pytest.mark.parametrize(
    "text",
    [
        *("", "[]", "{}", "[" * 100_000, '{"weight_map": []}', '{"weight_map": {"a": 5}}'),
        *(json.dumps({"weight_map": {"a": name}}) for name in ("", "x" * 5000, "a\0b", None)),
        *(json.dumps({"weight_map": {"a": name}}) for name in ("/etc/passwd", "../x", "x/../../y")),
    ],
    ids=range(13),
)
def test_a_broken_index_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(
        InvalidCheckpoint, match=rf"{re.escape(str(tmp_path / INDEX))}[: ].{{,200}}$"
    ):
        Checkpoint(tmp_path)


def written(path: Path, header: object, data: bytes = bytes(64)) -> Path:
    """A file by hand; `header` may be bytes that are no JSON."""
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(content).to_bytes(8, "little") + content + data)
    return path


def entry(dtype: str, shape: object, start: object = 0, stop: object = 64) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"\xff",
        {"a": entry("F32", [16]), "b": entry("F32", [16])},  # upon one another
        {"a": entry("F32", [1], 0, 4), "b": entry("F32", [1], 60)},  # a hole
        {"a": entry("F32", [16], 64, 0)},
        {"a": entry("F32", [8], 0, 32)},  # a tail
        {"a": entry("F32", [17], 0, 68)},
        {"a": entry("F32", [2**62, 4])},
        {"a": entry("F32", [-16])},
        {"a": entry("F32", [16.0])},
        {"a": entry("F32", "16")},
        {"a": entry("F33", [16])},
        {"a": entry("x" * 100_000, [16])},
        {"a": entry("F4", [128])},
        {"a": entry("C64", [8])},
        {"a": {"dtype": "F32"}},
        {"a": None},
        {"__metadata__": {"a": 3}, "a": entry("F32", [16])},
    ],
    ids=lambda header: str(header)[:40],
)
def test_a_header_that_lies_is_refused_by_the_files_name(tmp_path: Path, header: object) -> None:
    path = written(tmp_path / "model.safetensors", header)
    with pytest.raises(InvalidCheckpoint, match=re.escape(str(path))) as refusal:
        Checkpoint(tmp_path)
    assert len(str(refusal.value)) < 600


def test_a_header_of_terabytes_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes((1 << 40).to_bytes(8, "little") + b"{}")
    with pytest.raises(InvalidCheckpoint, match="header of 1099511627776 bytes, the limit is"):
        Checkpoint(tmp_path)


def test_every_mutant_of_a_file_is_refused_or_read(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": A, "b": B.half(), "c": torch.tensor(3, dtype=torch.int8)}, path)
    good = path.read_bytes()
    outcomes = set()
    for number, content in mutants(good, 1500, header=len(good) - A.nbytes - B.nbytes // 2):
        path.write_bytes(content)
        try:
            with Checkpoint(tmp_path) as checkpoint:
                for name in list(checkpoint._file_of):
                    assert checkpoint.stored(name).shape == checkpoint.shape(name)
            outcomes.add("read")
        except InvalidCheckpoint:
            outcomes.add("refused")
        except BaseException as error:
            error.add_note(f"mutant {number}")
            raise
    assert outcomes == {"read", "refused"}


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\x00" * 16)
    with pytest.raises(InvalidCheckpoint, match=r"model\.safetensors is not a safetensors file"):
        Checkpoint(tmp_path)


def test_spans_of_rows_are_read_across_tensors(tmp_path: Path) -> None:
    save_file(
        {"a": torch.arange(8.0).view(4, 2), "b": torch.arange(8.0, 14).view(3, 2)},
        tmp_path / "model.safetensors",
    )
    with Checkpoint(tmp_path) as checkpoint:
        part = checkpoint.load_rows(
            ["a", "b"], dtype=torch.float32, device=CPU, rows=[(1, 2), (3, 6)]
        )
        assert part.tolist() == [[2, 3], [6, 7], [8, 9], [10, 11]]
        assert checkpoint.bytes_loaded == part.nbytes


def test_a_span_of_columns_is_read_alone(tmp_path: Path) -> None:
    save_file({"a": torch.arange(8.0).view(2, 4)}, tmp_path / "model.safetensors")
    with Checkpoint(tmp_path) as checkpoint:
        part = checkpoint.load_columns("a", (1, 3), dtype=torch.float32, device=CPU)
        assert part.tolist() == [[1, 2], [5, 6]]
        assert checkpoint.bytes_loaded == part.nbytes


def test_rows_that_are_not_there_are_refused(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    with (
        Checkpoint(tmp_path) as checkpoint,
        pytest.raises(InvalidCheckpoint, match="weights a have no rows"),
    ):
        checkpoint.load_rows(["a"], dtype=torch.float32, device=CPU, rows=[(1, 3)])


@pytest.mark.parametrize("is_indexed", [True, False])
def test_a_pipe_in_the_place_of_weights_is_not_waited_for(tmp_path: Path, is_indexed: bool) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    if is_indexed:
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "model.safetensors"}}))
    with pytest.raises(InvalidCheckpoint, match=r"model\.safetensors is no regular file"):
        Checkpoint(tmp_path)
