"""A GGUF file is read as the gguf package reads it, and no lie in it costs more than its bytes."""

import struct
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from tests.fakes.broken_files import LIES, mutants
from tests.launcher.convert.test_gguf import write_gguf

from kagami_launcher.convert.files import ConversionRefused
from kagami_launcher.convert.gguf_file import open_file
from kagami_launcher.convert.run import Task, convert

U32, F32, TEXT, ARRAY, U64 = 4, 6, 8, 9, 10
MAX_BYTES = 4 << 20  # in memory, for files of a hundred bytes


def test_it_reads_what_the_gguf_package_reads(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "a.gguf")
    ours, theirs = open_file(path), gguf.GGUFReader(path)
    for key, field in theirs.fields.items():
        if not key.startswith("GGUF."):
            assert readable(ours.values[key]) == field.contents()
    assert list(ours.tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        mine = ours.tensors[tensor.name]
        assert mine.shape == tuple(reversed(tensor.shape.tolist()))
        assert mine.tensor_type == tensor.tensor_type
        assert mine.data.tobytes() == tensor.data.tobytes()


def readable(value: Any) -> Any:
    if isinstance(value, list):
        return [readable(item) for item in value]
    return value.decode() if isinstance(value, bytes) else value


# --- lies -----------------------------------------------------------------------------------------


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def header(num_tensors: int = 0, num_values: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, num_tensors, num_values)


def value(kind: int, content: bytes, key: str = "a.b") -> bytes:
    return header(0, 1) + text(key) + struct.pack("<I", kind) + content


def array(kind: int, count: int, content: bytes = b"") -> bytes:
    return value(ARRAY, struct.pack("<IQ", kind, count) + content)


def tensors(*infos: tuple[str, tuple[int, ...], int, int], data: int = 256) -> bytes:
    """Names, sizes (the fastest first), types and offsets; then zeros."""
    body = header(len(infos), 0)
    for name, sizes, kind, offset in infos:
        body += text(name) + struct.pack("<I", len(sizes))
        body += struct.pack(f"<{len(sizes)}QIQ", *sizes, kind, offset)
    return body + bytes(-len(body) % 32) + bytes(data)


def aligned(alignment: int) -> bytes:
    return value(U32, struct.pack("<I", alignment), key="general.alignment")


CASES = {
    "array of 2^60 numbers": (array(U32, 2**60), "`a.b`, its elements: 1152921504606846976"),
    "array of 2^60 texts": (array(TEXT, 2**60), "`a.b`, its elements: 1152921504606846976"),
    "array of a million numbers": (array(U32, 10**6), "takes 4000000 bytes, and the file has 0"),
    "array of a million texts": (array(TEXT, 10**6, bytes(80)), "takes 8000000 bytes"),
    "array in an array": (array(ARRAY, 1, bytes(12)), "`a.b` is an array of type 9"),
    "array of a type that is none": (array(99, 1, bytes(12)), "`a.b` is an array of type 99"),
    "a text in an array": (
        array(TEXT, 2, text("x") + struct.pack("<Q", 2**60)),
        "`a.b`, element 1 takes 1152921504606846976 bytes, and the file has 8",
    ),
    "a type that is none": (value(99, bytes(8)), "`a.b` has type 99"),
    "a text of 2^63": (value(TEXT, struct.pack("<Q", 2**63)), "takes 9223372036854775808 bytes"),
    "a number without its bytes": (value(U64, b"\0" * 7), "takes 8 bytes, and the file has 7"),
    "a key of 2^60": (header(0, 1) + struct.pack("<Q", 2**60) + bytes(32), "the limit is 65535"),
    "a key that is no UTF-8": (
        header(0, 1) + struct.pack("<Q", 1) + b"\xff" + bytes(32),
        "key 0 has a name that is not UTF-8",
    ),
    "2^60 keys": (header(0, 2**60), "key-value count: 1152921504606846976, the limit is 4096"),
    "a thousand keys": (header(0, 1000), "key-value count takes 13000 bytes"),
    "2^60 tensors": (header(2**60), "tensor count: 1152921504606846976, the limit is 65536"),
    "a key twice": (
        header(0, 2) + (text("a.b") + struct.pack("<II", U32, 1)) * 2,
        "key `a.b` is there twice",
    ),
    "alignment 0": (aligned(0), "`general.alignment` is 0, expected a power of two"),
    "alignment 24": (aligned(24), "`general.alignment` is 24"),
    "alignment that is text": (
        value(TEXT, text("32"), key="general.alignment"),
        "`general.alignment` is b'32'",
    ),
    "no dimension": (tensors(("t", (), 0, 0)), "tensor `t` has 0 dimensions"),
    "five dimensions": (tensors(("t", (1,) * 5, 0, 0)), "tensor `t` has 5 dimensions"),
    "2^32 - 1 dimensions": (
        header(1) + text("t") + struct.pack("<I", 2**32 - 1) + bytes(64),
        "tensor `t` has 4294967295 dimensions",
    ),
    "a dimension of 0": (tensors(("t", (0, 4), 0, 0)), r"tensor `t` has shape \[4, 0\]"),
    "dimensions that overflow": (
        tensors(("t", (2**32, 2**32), 0, 0)),
        "takes 73786976294838206464 bytes",
    ),
    "rows of half a block": (tensors(("t", (16,), 8, 0)), "have a multiple of 32 numbers"),
    "a tensor of a type that is none": (tensors(("t", (8,), 99, 0)), "tensor `t` has type 99"),
    "a tensor behind the end": (tensors(("t", (8,), 0, 2**40)), "takes 32 bytes at 1099511627"),
    "a tensor that passes the end": (tensors(("t", (65,), 0, 0)), "takes 260 bytes at 64"),
    "an offset between": (tensors(("t", (8,), 0, 4)), "begins at offset 4, which is no multiple"),
    "tensors upon one another": (
        tensors(("t", (8,), 0, 0), ("u", (8,), 0, 0)),
        "tensors `t` and `u` overlap",
    ),
    "tensors in one another": (
        tensors(("t", (64,), 0, 0), ("u", (8,), 0, 32)),
        "tensors `t` and `u` overlap",
    ),
    "a tensor twice": (tensors(("t", (8,), 0, 0), ("t", (8,), 0, 32)), "tensor `t` is there twice"),
    "a name of 2^60": (header(1) + struct.pack("<Q", 2**60) + bytes(64), "the limit is 127"),
    "a name of 200": (tensors(("t" * 200, (8,), 0, 0)), "name of 200 bytes, the limit is 127"),
    "another byte order": (
        b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
        "GGUF version 50331648 is not supported",
    ),
    "version 1": (header(version=1), "GGUF version 1 is not supported"),
    "another magic": (b"GGML" + bytes(32), "begins with b'GGML'"),
    "nothing": (b"", "it has 0 bytes"),
    "a magic alone": (b"GGUF", "it has 4 bytes"),
}  # fmt: skip


@pytest.mark.parametrize(("content", "why"), CASES.values(), ids=CASES)
def test_a_file_that_lies_is_refused_for_its_own_bytes(
    tmp_path: Path, content: bytes, why: str
) -> None:
    path = tmp_path / "lie.gguf"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(ConversionRefused, match=why):
            open_file(path)
        assert tracemalloc.get_traced_memory()[1] < MAX_BYTES
    finally:
        tracemalloc.stop()


def test_what_a_message_shows_of_a_file_is_short(tmp_path: Path) -> None:
    path = tmp_path / "lie.gguf"
    path.write_bytes(value(99, bytes(8), key="\n" * 60_000))
    with pytest.raises(ConversionRefused) as refusal:
        open_file(path)
    assert len(str(refusal.value)) < 200
    assert "\n" not in str(refusal.value)


# --- mutants --------------------------------------------------------------------------------------


def refusal(path: Path, destination: Path) -> str:
    """Why a file is not converted; empty if it is."""
    try:
        convert(Task(path, destination))
    except ConversionRefused as refused:
        return str(refused)
    return ""


@pytest.mark.parametrize("extra", [{}, {"rope_freqs__weight": np.ones(4, np.float32)}])
def test_every_mutant_of_a_file_is_refused_or_converted(
    tmp_path: Path, extra: dict[str, Any]
) -> None:
    good = write_gguf(tmp_path / "good.gguf", **extra).read_bytes()
    path = tmp_path / "mutant.gguf"
    outcomes = set()
    for number, content in mutants(good, 250, header=good.rindex(b".weight") + 64):
        path.write_bytes(content)
        try:
            why = refusal(path, tmp_path / "m" / "snapshots" / str(number))
        except BaseException as error:
            error.add_note(f"mutant {number}")
            raise
        assert "\n" not in why
        outcomes.add(not why)
    assert outcomes == {True, False}


@pytest.mark.parametrize("lie", LIES)
@pytest.mark.parametrize(
    "key",
    [
        "llama.block_count",
        "llama.context_length",
        "llama.embedding_length",
        "llama.feed_forward_length",
        "llama.attention.head_count",
        "llama.attention.head_count_kv",
        "llama.rope.dimension_count",
        "llama.rope.freq_base",
        "llama.attention.layer_norm_rms_epsilon",
        "tokenizer.ggml.bos_token_id",
        "tokenizer.ggml.eos_token_id",
        "tokenizer.ggml.unknown_token_id",
        "tokenizer.ggml.padding_token_id",
    ],
)
def test_a_number_that_lies_is_refused_by_its_name(tmp_path: Path, key: str, lie: int) -> None:
    good = write_gguf(tmp_path / "good.gguf").read_bytes()
    path = tmp_path / "lie.gguf"
    at = good.index(text(key)) + len(text(key)) + 4
    (true,) = struct.unpack_from("<I", good, at)
    path.write_bytes(good[:at] + struct.pack("<I", lie % 2**32) + good[at + 4 :])
    why = refusal(path, tmp_path / "m" / "snapshots" / "key")
    if why:
        assert key.partition(".")[2] in why or "tensor `" in why
    else:  # true, or a number that no tensor contradicts
        assert lie == true or key.endswith(("context_length", "freq_base", "epsilon", "_id"))
