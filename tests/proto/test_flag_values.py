import pytest

from kagami_proto.flag_values import LARGEST, Real, Whole


@pytest.mark.parametrize("text", ["0", "7", str(LARGEST), "007"])
def test_a_whole_number_in_its_range_is_read(text: str) -> None:
    assert Whole()(text) == int(text)


@pytest.mark.parametrize(
    "text", ["", "-1", "+1", "1.5", "1e3", "٣", "x", str(LARGEST + 1), str(2**64), "9" * 5000]
)
def test_any_other_text_is_refused_with_the_range(text: str) -> None:
    with pytest.raises(ValueError, match="expected a whole number, 0 to 2147483647"):
        Whole()(text)


def test_a_range_has_both_its_ends() -> None:
    assert [Whole(1, 2)(text) for text in "12"] == [1, 2]
    for text in "03":
        with pytest.raises(ValueError, match="expected a whole number, 1 to 2"):
            Whole(1, 2)(text)
    assert [Real(0, 1)(text) for text in ("0", "1", "0.5", "1e-3")] == [0, 1, 0.5, 0.001]


@pytest.mark.parametrize("text", ["", "x", "nan", "inf", "-inf", "1e999", "-0.1", "1.01"])
def test_what_is_no_number_or_out_of_range_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected a number, 0 to 1"):
        Real(0, 1)(text)
