"""The pickle of a PyTorch file is read without being run."""

import io
import pickle
import struct
import tracemalloc
from collections import Counter, OrderedDict
from typing import Any

import pytest
import torch
from tests.fakes.torch_lies import Call, pickled

from kagami_launcher.convert import torch_pickle
from kagami_launcher.convert.torch_pickle import NotPlain, read

PLAIN = {"a": 1, "b": [2.5, None, True, "text", b"bytes"], "c": (1, (2, 3), ()), "d": -(2**40)}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_values_are_read(protocol: int) -> None:
    if protocol == 2:  # bytes are a call there
        value = {**PLAIN, "b": PLAIN["b"][:4]}  # type: ignore[index]  # is a list
    else:
        value = PLAIN
    assert read(io.BytesIO(pickle.dumps(value, protocol))) == value


def test_the_next_pickle_can_be_read_behind_it() -> None:
    file = io.BytesIO(pickle.dumps([1], 2) + pickle.dumps("x", 4))
    assert [read(file), read(file)] == [[1], "x"]


def test_an_ordered_dict_is_a_dict() -> None:
    value = OrderedDict(a=1)
    value.note = 3  # type: ignore[attr-defined]
    assert read(io.BytesIO(pickled(value))) == {"a": 1}


PROTO = b"\x80\x02"
CODES = {
    "bytes of 2^60": (PROTO + b"\x8e" + struct.pack("<Q", 2**60) + b"x.", ValueError),
    "bytes of 2^31": (PROTO + b"B" + struct.pack("<I", 2**31) + b"x.", ValueError),
    "text of 2^60": (PROTO + b"\x8d" + struct.pack("<Q", 2**60) + b"x.", ValueError),
    "a long of 2^31 - 1 bytes": (PROTO + b"\x8b" + struct.pack("<i", 2**31 - 1) + b".", ValueError),
    "a frame of 2^60": (b"\x80\x04\x95" + struct.pack("<Q", 2**60) + b"N.", None),
    "the memo's place 2^32 - 1": (PROTO + b"Nr" + b"\xff" * 4 + b".", None),
    "what the memo does not have": (PROTO + b"j" + b"\xff" * 4 + b".", ValueError),
    "no stack": (PROTO + b"0.", ValueError),
    "no mark": (PROTO + b"t.", ValueError),
    "a tuple of too few": (PROTO + b"N\x87.", ValueError),
    "no end": (PROTO + b"N", ValueError),
    "nothing": (b"", ValueError),
    "no operation": (PROTO + b"\xff.", ValueError),
    "an odd dict": (PROTO + b"}(Nu.", ValueError),
    "a list as a dict": (PROTO + b"]NNs.", ValueError),
    "a dict as a key": (PROTO + b"}}Ns.", NotPlain),
    "an item of no list": (PROTO + b"}Na.", ValueError),
    "an extension": (PROTO + b"\x82\x01.", NotPlain),
    "an old instance": (PROTO + b"(cos\nsystem\no.", NotPlain),
    "a call of text": (PROTO + b"X\x01\x00\x00\x00a)R.", NotPlain),
    "a class without a name": (b"\x80\x04NN\x93.", NotPlain),
    "text that is no UTF-8": (PROTO + b"X\x01\x00\x00\x00\xff.", ValueError),
    "a persistent id of nothing": (PROTO + b"NQ.", ValueError),
    "an old persistent id": (PROTO + b"Pstorage\n.", NotPlain),
    "attributes of nothing": (PROTO + b"N}b.", ValueError),
}  # fmt: skip


@pytest.mark.parametrize(("code", "expected"), CODES.values(), ids=CODES)
def test_an_operation_costs_what_its_bytes_are(
    code: bytes, expected: type[Exception] | None
) -> None:
    tracemalloc.start()
    try:
        if expected is None:
            assert read(io.BytesIO(code)) is None
        else:
            with pytest.raises(expected):
                read(io.BytesIO(code))
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "value",
    [
        Call(bytearray, 2**40),
        Call(torch.Tensor, 2**40),
        Call(torch.FloatStorage, 2**40),
        Call(print, "called"),
        Call(Counter, "a" * 100),
        Call(exec, "raise SystemExit"),
        torch.ones,
    ],
)
def test_what_is_not_known_is_named_and_not_called(value: Any) -> None:
    with pytest.raises(NotPlain, match=r"it asks for|it calls a|builds"):
        read(io.BytesIO(pickled({"a": value})))


def test_operations_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_pickle, "_MAX_OPERATIONS", 100)
    assert read(io.BytesIO(PROTO + b"N0" * 40 + b"N.")) is None
    with pytest.raises(NotPlain, match="more than 100 operations"):
        read(io.BytesIO(PROTO + b"N0" * 80 + b"N."))


def test_a_million_laughs_are_one(tmp_path: Any) -> None:
    value: list[Any] = []
    for _ in range(100_000):
        value = [value, value]
    code = PROTO + b"]q\0" + b"".join(b"]q\1(h\0h\0eq\0" for _ in range(100_000)) + b"."
    assert isinstance(read(io.BytesIO(code)), list)
