import json
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kagami_router.api.schemas.encoding import encode, shortest


@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_the_printed_number_names_the_same_32_bit_value(value: float) -> None:
    printed = json.loads(encode(shortest(value)))
    assert struct.pack("f", printed) == struct.pack("f", value)


@given(st.integers(-999_999, 999_999), st.integers(1, 6))
def test_short_decimals_stay_short(digits: int, exponent: int) -> None:
    written = digits / 10**exponent
    stored = struct.unpack("f", struct.pack("f", written))[0]
    assert shortest(stored) == written


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_what_json_cannot_say_is_null(value: float) -> None:
    assert encode(shortest(value)) == b"null"
