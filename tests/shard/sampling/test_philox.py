"""Against the known-answer vectors of the Random123 distribution (kat_vectors, philox4x32 10)."""

import pytest

from kagami_shard.sampling.philox import philox, uniform


def words(text: str) -> list[int]:
    return [int(word, 16) for word in text.split()]


def as_number(parts: list[int]) -> int:
    return sum(part << 32 * index for index, part in enumerate(parts))


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        (
            "00000000 00000000 00000000 00000000",
            "00000000 00000000",
            "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
        ),
        (
            "ffffffff ffffffff ffffffff ffffffff",
            "ffffffff ffffffff",
            "408f276d 41c83b0e a20bc7c6 6d5451fd",
        ),
        (
            "243f6a88 85a308d3 13198a2e 03707344",
            "a4093822 299f31d0",
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_known_answers(counter: str, key: str, expected: str) -> None:
    drawn = philox(as_number(words(key)), as_number(words(counter)))

    assert list(drawn) == words(expected)


def test_uniform_is_in_range_and_depends_on_seed_and_position() -> None:
    numbers = {uniform(seed, position) for seed in (0, 1, 2**64 - 1) for position in range(200)}

    assert len(numbers) == 600
    assert all(0 <= number < 1 for number in numbers)
    assert 0.45 < sum(numbers) / 600 < 0.55
