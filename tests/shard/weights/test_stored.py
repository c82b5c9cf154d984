from pathlib import Path

import torch
from safetensors.torch import save_file

from kagami_shard.weights.checkpoint import Checkpoint
from kagami_shard.weights.stored import StoredRows, drop_pages

CPU = torch.device("cpu")
A = torch.arange(6.0).view(2, 3).bfloat16()
B = torch.arange(12.0).view(4, 3).bfloat16() + 10
LARGE = torch.arange(1 << 19).view(512, 1024).to(torch.int16).view(torch.bfloat16)


def stored(folder: Path, *names: str, dtype: torch.dtype = torch.bfloat16) -> StoredRows:
    with Checkpoint(folder) as checkpoint:
        return checkpoint.stored_rows(names, dtype=dtype, device=CPU)


def mapped_bytes(file: Path) -> int:
    """Resident bytes of the mappings of `file`."""
    total, is_of_file = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name = line.split()[0]
        if not name.endswith(":"):
            is_of_file = line.endswith(str(file))
        elif is_of_file and name == "Rss:":
            total += int(line.split()[1]) * 1024
    return total


def test_parts_in_the_wanted_dtype_lie_in_the_file(tmp_path: Path) -> None:
    save_file({"a": A, "b": B}, tmp_path / "model.safetensors")
    first, second = stored(tmp_path, "b", "a").in_place()
    assert (first.tolist(), second.tolist()) == (B.tolist(), A.tolist())


def test_parts_in_another_dtype_are_one_part_that_is_cast(tmp_path: Path) -> None:
    save_file({"a": A, "b": B.half()}, tmp_path / "model.safetensors")
    (whole,) = stored(tmp_path, "a", "b").in_place()
    assert whole.dtype == torch.bfloat16
    assert whole.tolist() == [*A.tolist(), *B.tolist()]


def test_the_tensor_is_read_once(tmp_path: Path) -> None:
    save_file({"a": A, "b": B}, tmp_path / "model.safetensors")
    rows = stored(tmp_path, "a", "b")
    assert rows.shape == (6, 3)
    assert rows.tensor() is rows.tensor()
    assert torch.equal(rows.tensor(), torch.cat([A, B]))


def test_what_has_been_read_lets_its_file_go(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"a": LARGE}, file)
    rows = stored(tmp_path, "a")
    assert str(file) in Path("/proc/self/maps").read_text()
    whole = rows.tensor()
    assert str(file) not in Path("/proc/self/maps").read_text()
    assert rows.in_place()[0] is whole


def test_pages_given_back_are_not_resident(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"a": LARGE}, file)
    rows = stored(tmp_path, "a")
    assert torch.equal(rows.in_place()[0].view(torch.int16), LARGE.view(torch.int16))
    assert mapped_bytes(file) > 1 << 19
    rows.give_back()
    assert mapped_bytes(file) < 1 << 14


def test_pages_given_back_can_be_read_again(tmp_path: Path) -> None:
    save_file({"a": LARGE}, tmp_path / "model.safetensors")
    rows = stored(tmp_path, "a")
    rows.give_back()
    assert torch.equal(rows.in_place()[0].view(torch.int16), LARGE.view(torch.int16))


def test_neighbours_keep_the_pages_they_share() -> None:
    values = torch.arange(1 << 12)
    drop_pages(values[100:200])
    assert values.tolist() == list(range(1 << 12))
