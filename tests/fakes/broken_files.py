"""Mutants of a good binary file: what a broken disk or a hostile author makes of it.

Seeded, so that a failing mutant can be made again from its number.
"""

import struct
from collections.abc import Iterator
from random import Random

# What counts, lengths and offsets lie with.
LIES = (0, 1, 2, 7, 64, 255, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**60, 2**63 - 1, 2**63, 2**64 - 1)


def mutants(good: bytes, count: int, *, header: int | None = None) -> Iterator[tuple[int, bytes]]:
    """`count` mutants with their numbers; changes fall into the first `header` bytes only."""
    end = len(good) if header is None else min(header, len(good))
    for number in range(count):
        random = Random(number)
        data = bytearray(good)
        for _ in range(random.choice((1, 1, 1, 2, 4))):
            random.choice((_lie, _lie, _flip, _cut, _drop, _repeat))(data, random, end)
        yield number, bytes(data)


def _lie(data: bytearray, random: Random, end: int) -> None:
    size, form = random.choice(((8, "<Q"), (8, "<Q"), (4, "<I"), (2, "<H")))
    at = random.randrange(max(1, min(end, len(data)) - size))
    data[at : at + size] = struct.pack(form, random.choice(LIES) % 2 ** (8 * size))


def _flip(data: bytearray, random: Random, end: int) -> None:
    if data:
        data[random.randrange(min(end, len(data)))] = random.randrange(256)


def _cut(data: bytearray, random: Random, end: int) -> None:
    del data[random.randrange(len(data) + 1) :]


def _drop(data: bytearray, random: Random, end: int) -> None:
    at = random.randrange(min(end, len(data)) + 1)
    del data[at : at + random.randrange(1, 16)]


def _repeat(data: bytearray, random: Random, end: int) -> None:
    at = random.randrange(min(end, len(data)) + 1)
    data[at:at] = data[at : at + random.randrange(1, 64)]
