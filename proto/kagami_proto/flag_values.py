"""Numbers of flags and environment variables, each with its range.

A number outside of its range is refused where it is read: further on it would overflow a field of
a message, or ask for memory that no machine has.
"""

import math
from dataclasses import dataclass

LARGEST = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Whole:
    """Reads a whole number; raises `ValueError` with the range."""

    low: int = 0
    high: int = LARGEST

    def __call__(self, text: str) -> int:
        # So many digits are no number of any flag, and Python takes long to read very many.
        if text.isascii() and text.isdecimal() and len(text) <= 20:
            if self.low <= (number := int(text)) <= self.high:
                return number
        raise ValueError(f"expected a whole number, {self.low} to {self.high}")


@dataclass(frozen=True, slots=True)
class Real:
    """Reads a number; raises `ValueError` with the range."""

    low: float
    high: float

    def __call__(self, text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            number = math.nan
        if not self.low <= number <= self.high:  # nan is in no range
            raise ValueError(f"expected a number, {self.low:g} to {self.high:g}")
        return number


PORT = Whole(0, 65_535)
SECONDS = Real(0.001, 1e6)
"""Of a time limit, which cannot be none"""
THREADS = Whole(0, 1024)
"""Threads and processes of one kind"""
