"""What is asked of a server: how many requests, how long, and when they come.

Pure values. Lengths are tokens. The four named workloads are those of Kagami's own figures, so that
everybody's tables have the same rows.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from random import Random
from typing import NamedTuple


class Length(NamedTuple):
    """A number of tokens, drawn evenly from `low` to `high`."""

    low: int
    high: int

    def draw(self, random: Random) -> int:
        return self.low if self.low == self.high else random.randint(self.low, self.high)

    def __str__(self) -> str:
        return str(self.low) if self.low == self.high else f"{self.low}-{self.high}"


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests of one kind.

    With `rate`, that many requests a second arrive on average, with exponential gaps (a Poisson
    process). Without it, each of `concurrency` clients sends the next when the last is answered.
    """

    name: str
    prompt: Length
    """Tokens of each prompt after the shared prefix."""
    output: Length
    num_requests: int
    prefix_tokens: int = 0
    """Tokens of the prefix that all prompts of a run share; each run has a new one."""
    concurrency: int = 0
    rate: float = 0.0

    @property
    def arrivals(self) -> str:
        """How its requests come, in words."""
        if self.rate:
            return f"{self.rate:g} requests/s"
        return f"{self.concurrency} client{'s' if self.concurrency > 1 else ''}"

    def describe(self) -> str:
        """The workload in one line, without its name."""
        prefix = f"{self.prefix_tokens} shared + " if self.prefix_tokens else ""
        return f"{self.arrivals}, {prefix}{self.prompt} in, {self.output} out"


def gaps(rate: float, random: Random) -> Iterator[float]:
    """Seconds between arrivals of a Poisson process."""
    while True:
        yield random.expovariate(rate)


def _closed(
    name: str, concurrency: int, num_requests: int, prompt: int, output: int, prefix: int = 0
) -> Workload:
    return Workload(
        name=name,
        prompt=Length(prompt, prompt),
        output=Length(output, output),
        num_requests=num_requests,
        prefix_tokens=prefix,
        concurrency=concurrency,
    )


NAMED: Mapping[str, Workload] = {
    one.name: one
    for one in (
        _closed("W1", 1, 2, 128, 128),
        _closed("W2", 16, 16, 128, 128),
        _closed("W3", 16, 32, 32, 64, 1024),
        _closed("W4", 4, 8, 1024, 8),
    )
}
