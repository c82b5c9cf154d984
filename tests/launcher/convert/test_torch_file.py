"""A PyTorch file is read as torch reads it, and costs what its bytes are, whatever it claims."""

import re
import struct
import tracemalloc
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.fakes.broken_files import LIES, mutants
from tests.fakes.torch_lies import FOUR, Call, StorageAt, archive, claim, row_of_pickles
from torch import Tensor, nn

from kagami_launcher.convert.files import ConversionRefused
from kagami_launcher.convert.pickles import convert_file, read_pickle

MAX_BYTES = 4 << 20


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def zoo() -> dict[str, Any]:
    """Tensors of all kinds that are converted."""
    torch.manual_seed(0)
    base = torch.randn(6, 8)
    tagged = nn.Parameter(torch.randn(3))
    tagged.note = "a parameter with an attribute"  # type: ignore[attr-defined]
    wanted = ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")
    wanted += ("int64", "int32", "int16", "int8", "uint8", "bool")
    return {
        **{name: torch.arange(5).to(getattr(torch, name)) for name in wanted},
        "transposed": base.T,
        "part": base[2:4, 1:7:2],
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
        "parameter": nn.Parameter(torch.randn(2, 2)),
        "tagged": tagged,
        "buffer": nn.Buffer(torch.ones(2)),
    }


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}])
def test_it_reads_what_torch_reads(tmp_path: Path, options: dict[str, Any]) -> None:
    tensors = zoo()
    if options:  # the older form cannot hold these
        del tensors["float8_e4m3fn"], tensors["float8_e5m2"]
    torch.save(tensors, tmp_path / "a.bin", **options)
    theirs = torch.load(tmp_path / "a.bin", weights_only=True)
    ours = read_pickle(tmp_path / "a.bin")
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert (ours[name].dtype, ours[name].shape) == (tensor.dtype, tensor.shape), name
        assert bits(ours[name]) == bits(tensor), name


def test_a_modules_own_dict_is_read(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Linear(3, 2), nn.LayerNorm(2))
    for number, content in enumerate((module.state_dict(), {"state_dict": module.state_dict()})):
        torch.save(content, tmp_path / f"{number}.bin")
        found = read_pickle(tmp_path / f"{number}.bin")
        assert {name: bits(item) for name, item in found.items()} == {
            name: bits(item) for name, item in module.state_dict().items()
        }


@pytest.mark.parametrize("write", [archive, row_of_pickles])
def test_a_claim_that_the_file_keeps_is_read(tmp_path: Path, write: Callable[..., Path]) -> None:
    found = read_pickle(write(tmp_path / "a.bin", {"a": claim((2, 2), (1, 2))}))
    assert found["a"].tolist() == [[1, 3], [2, 4]]


BIG = 2**40
CLAIMS = {
    "a stride of 0": (claim((BIG,), (0,)), r"size \[1099511627776\], stride \[0\]"),
    "a stride of 0 in front": (claim((BIG, 4), (0, 1)), r"stride \[0, 1\]"),
    "a stride of 0 behind": (claim((4, BIG), (1, 0)), r"stride \[1, 0\]"),
    "one number more than there is": (claim((5,)), "of 4 numbers"),
    "a step beyond the end": (claim((2, 2), (3, 1)), "of 4 numbers"),
    "an offset beyond the end": (claim((1,), (1,), 4), "storage_offset 4 does not fit"),
    "an offset of 2^62": (claim((1,), (1,), 2**62), "does not fit"),
    "a negative size": (claim((-1,)), "`a`: its size has -1"),
    "a negative stride": (claim((4,), (-1,)), "`a`: its stride has -1"),
    "a negative offset": (claim((1,), (1,), -1), "`a`: its storage_offset has -1"),
    "a size of 2^70": (claim((2**70,)), "`a`: its size has 1180591620717411303424"),
    "sizes that overflow": (claim((2**40, 2**40), (0, 0)), "does not fit"),
    "a size that is text": (claim(("4",)), "`a`: its size has a str"),
    "a size that is true": (claim((True,)), "`a`: its size has a bool"),
    "a size that is no list": (claim(4), "`a`: its size is not up to 16 numbers"),
    "a thousand dimensions": (claim((1,) * 1000, (1,) * 1000), "not up to 16 numbers"),
    "sizes without strides": (claim((2, 2), (1,)), r"has size \[2, 2\] and stride \[1\]"),
    "a storage of 2^40 numbers": (claim(storage=StorageAt(BIG)), "4398046511104 bytes, and"),
    "a storage of -1 numbers": (claim(storage=StorageAt(-1)), "said to have -4 bytes"),
    "a storage that is not there": (claim(storage=StorageAt(4, "7")), "storage `7` is not in the"),
    "a storage of another name": (claim(storage=StorageAt(4, "../0")), "is not in the file"),
    "doubles in place of floats": (
        claim(storage=StorageAt(4, "0", torch.DoubleStorage)),
        "said to have 32 bytes, and the file has 16",
    ),
    "a storage without a number": (claim(storage=StorageAt("4")), "a storage without a key or a"),
    "a storage with a number as key": (claim(storage=StorageAt(4, 0)), "a storage without a key"),
    "a storage of no type": (claim(storage=StorageAt(4, "0", "f")), "names no storage"),
    "no storage": (claim(storage=[1, 2]), "a tensor without a storage"),
}


@pytest.mark.parametrize("write", [archive, row_of_pickles])
@pytest.mark.parametrize(("lie", "why"), CLAIMS.values(), ids=CLAIMS)
def test_a_tensor_that_the_file_does_not_have_is_refused(
    tmp_path: Path, write: Callable[..., Path], lie: Any, why: str
) -> None:
    if write is row_of_pickles:  # its keys say which storages follow, and the types how long
        why = why.replace("said to have 32 bytes, and the file has 16", "the file 16 bytes more")
        why = re.sub(".*(is not in the).*", "belongs to no tensor", why)
    refused(write(tmp_path / "lie.bin", {"a": lie}), why)


def refused(path: Path, why: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(ConversionRefused, match=why) as refusal:
            convert_file(path, path.with_name("out.safetensors"))
        assert tracemalloc.get_traced_memory()[1] < MAX_BYTES
    finally:
        tracemalloc.stop()
    assert str(refusal.value).startswith("lie.bin")
    assert "\n" not in str(refusal.value)
    assert not path.with_name("out.safetensors").exists()


def test_many_names_of_one_storage_are_refused_and_four_are_not(tmp_path: Path) -> None:
    shared = torch.zeros(1000)
    torch.save({str(number): shared for number in range(4)}, tmp_path / "four.bin")
    assert len(read_pickle(tmp_path / "four.bin")) == 4
    torch.save({str(number): shared[number:] for number in range(900)}, tmp_path / "lie.bin")
    refused(tmp_path / "lie.bin", "more than 4 names for the same data")


def test_what_torch_expands_is_refused(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1).expand(72_000_000)}, tmp_path / "lie.bin")
    refused(tmp_path / "lie.bin", r"`a` of size \[72000000\], stride \[0\]")


# --- the archive ----------------------------------------------------------------------------------


def compressed(path: Path) -> Path:
    zeros = {"0": bytes(1 << 22)}
    return archive(path, {"a": claim()}, zeros, kind=zipfile.ZIP_DEFLATED)


def named_twice(path: Path) -> Path:
    with warnings.catch_warnings(action="ignore"):
        return archive(path, {"a": claim()}, extra={"m/data/0": FOUR})


def two_pickles(path: Path) -> Path:
    return archive(path, {"a": claim()}, extra={"n/data.pkl": b"."})


def big_endian(path: Path) -> Path:
    archive(path, {"a": claim()})
    path.write_bytes(path.read_bytes().replace(b"little", b"middle"))
    return path


def patched(old: bytes, at: int, new: bytes) -> Callable[[Path], Path]:
    """An archive in which the bytes at `at` behind the last `old` are others."""

    def write(path: Path) -> Path:
        content = bytearray(archive(path, {"a": claim()}).read_bytes())
        start = content.rindex(old) + at
        content[start : start + len(new)] = new
        path.write_bytes(content)
        return path

    return write


U32 = struct.Struct("<I").pack
ARCHIVES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "compressed entries": (compressed, "entry `m/data.pkl` is compressed"),
    "an entry twice": (named_twice, "entry `m/data/0` is there twice"),
    "two pickles": (two_pickles, "2 times a data.pkl"),
    "another byte order": (big_endian, "another order than little-endian"),
    "an entry of 4 GB": (patched(b"PK\1\2", 20, U32(2**32 - 2) * 2), "has 4294967294 bytes"),
    "an entry behind the end": (patched(b"PK\1\2", 42, U32(2**31)), "said to begin at 2147483648"),
    "an entry upon another": (patched(b"PK\1\2", 42, U32(0)), "overlap"),
    "an entry in another": (patched(b"PK\1\2", 42, U32(5)), "said to begin at 5, and does not"),
    "a directory of 4 GB": (patched(b"PK\5\6", 12, U32(2**32 - 2)), "directory has 4294967294"),
    "a directory that is elsewhere": (patched(b"PK\5\6", 16, U32(2**31)), "begin at -2147483"),
    "another method": (patched(b"PK\1\2", 10, b"\x0c"), "is compressed"),
    "encryption": (patched(b"PK\1\2", 8, b"\1"), "is encrypted"),
}


@pytest.mark.parametrize(("write", "why"), ARCHIVES.values(), ids=ARCHIVES)
def test_an_archive_that_lies_is_refused(
    tmp_path: Path, write: Callable[[Path], Path], why: str
) -> None:
    refused(write(tmp_path / "lie.bin"), why)


def test_a_directory_of_64_bits_that_lies_is_refused(tmp_path: Path) -> None:
    content = archive(tmp_path / "lie.bin", {"a": claim()}).read_bytes()
    end = content.rindex(b"PK\5\6")
    record = b"PK\6\6" + struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, 3, 3, 2**40, 0)
    locator = b"PK\6\7" + struct.pack("<IQI", 0, end, 1)
    (tmp_path / "lie.bin").write_bytes(content[:end] + record + locator + content[end:])
    refused(tmp_path / "lie.bin", "directory has 1099511627776 bytes, the limit is 16777216")


def test_a_long_pickle_is_refused(tmp_path: Path) -> None:
    archive(tmp_path / "lie.bin", b"\x80\x02" + b"]" * (17 << 20) + b".")
    with pytest.raises(ConversionRefused, match="its pickle has 17825795 bytes, the limit is"):
        read_pickle(tmp_path / "lie.bin")


# --- the row of pickles ---------------------------------------------------------------------------

ROWS = {
    "more numbers than bytes": ({"storages": struct.pack("<q", 2**60) + FOUR}, "the file 16 bytes"),
    "fewer than none": ({"storages": struct.pack("<q", -1) + FOUR}, "storage `0` has -1 numbers"),
    "no data": ({"storages": b""}, "storage `0` is behind the file's end"),
    "fewer numbers than claimed": (
        {"storages": struct.pack("<q", 3) + FOUR},
        "said to have 16 bytes, and the file has 12",
    ),
    "a storage of nobody": ({"keys": ("1", "0")}, "storage `1` belongs to no tensor"),
    "keys that are no text": ({"keys": (0,)}, "no list of its storages"),
}  # fmt: skip


@pytest.mark.parametrize(("lie", "why"), ROWS.values(), ids=ROWS)
def test_a_row_of_pickles_that_lies_is_refused(
    tmp_path: Path, lie: dict[str, Any], why: str
) -> None:
    refused(row_of_pickles(tmp_path / "lie.bin", {"a": claim()}, **lie), why)


# --- mutants --------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}])
def test_every_mutant_of_a_file_is_refused_or_converted(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    path, out = tmp_path / "mutant.bin", tmp_path / "out.safetensors"
    some = {name: tensor for name, tensor in zoo().items() if name in ("part", "scalar", "int8")}
    torch.save(OrderedDict(some), path, **options)
    good = path.read_bytes()
    outcomes = set()
    for number, content in mutants(good, 500):
        path.write_bytes(content)
        try:
            convert_file(path, out)
            outcomes.add("converted")
            assert out.stat().st_size < 8 * len(good)
        except ConversionRefused:
            outcomes.add("refused")
        except BaseException as error:
            error.add_note(f"mutant {number}")
            raise
    assert outcomes == {"refused", "converted"}


@pytest.mark.parametrize("lie", LIES)
def test_a_call_that_allocates_what_it_is_told_is_not_made(tmp_path: Path, lie: int) -> None:
    refused(archive(tmp_path / "lie.bin", {"a": Call(bytearray, lie)}), "asks for")
