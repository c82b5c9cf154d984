"""The kinds of metric, and the Prometheus text format 0.0.4.

Written here because prometheus_client puts `_total` behind every counter, and TGI's counters have
to keep their names. One writer, the event loop's thread, so nothing is locked.
"""

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar


class Series(Protocol):
    """Numbers under one name and one set of labels."""

    def samples(self, name: str, labels: str) -> Iterator[str]:
        """Their lines in the Prometheus text."""
        ...


class Value:
    """One number: a counter or a gauge."""

    __slots__ = ("value",)

    def __init__(self) -> None:
        self.value = 0.0

    def add(self, amount: float = 1.0) -> None:
        self.value += amount

    def set(self, value: float) -> None:
        self.value = float(value)

    def samples(self, name: str, labels: str) -> Iterator[str]:
        """The one line of this series."""
        yield f"{name}{_braces(labels)} {_number(self.value)}\n"


class Histogram:
    """Counts by upper bound; the counts are kept apart and summed up when rendered."""

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Count `value`, `times` over."""
        self._counts[bisect_left(self._bounds, value)] += times
        self._sum += float(value * times)

    def rebound(self, bounds: Sequence[float]) -> None:
        """Give a histogram that has seen nothing its bounds, known only now."""
        assert not any(self._counts), "a histogram cannot be sorted anew"
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)

    def samples(self, name: str, labels: str) -> Iterator[str]:
        """One line a bucket, then sum and count."""
        comma = "," if labels else ""
        total = 0
        for bound, count in zip((*self._bounds, float("inf")), self._counts, strict=True):
            total += count
            yield f'{name}_bucket{{{labels}{comma}le="{_number(bound)}"}} {total}\n'
        yield f"{name}_sum{_braces(labels)} {_number(self._sum)}\n"
        yield f"{name}_count{_braces(labels)} {total}\n"


def _braces(labels: str) -> str:
    return f"{{{labels}}}" if labels else ""


def _number(value: float) -> str:
    if value == float("inf"):
        return "+Inf"
    return str(int(value)) if value.is_integer() and abs(value) < 1e15 else repr(value)


_S = TypeVar("_S", bound=Series)


@dataclass(frozen=True, slots=True)
class Family(Generic[_S]):
    """Everything under one name; with a `label`, one series for each of its values."""

    name: str
    kind: str
    help: str
    label: str = ""
    series: dict[str, _S] = field(default_factory=dict)
    """By the label's value; "" where there is no label."""

    def __getitem__(self, value: str) -> _S:
        return self.series[value]

    def lines(self) -> Iterator[str]:
        """Help, type, then every sample."""
        yield f"# HELP {self.name} {self.help}\n# TYPE {self.name} {self.kind}\n"
        for value, series in self.series.items():
            labels = f'{self.label}="{value}"' if self.label else ""
            yield from series.samples(self.name, labels)


class Registry:
    """Every family, in the order in which they were named."""

    def __init__(self) -> None:
        self.families: list[Family[Value] | Family[Histogram]] = []

    def counter(self, name: str, text: str) -> Value:
        """A counter without a label."""
        return self.counters(name, text, "", ("",))[""]

    def gauge(self, name: str, text: str) -> Value:
        """A gauge without a label."""
        return self.gauges(name, text, "", ("",))[""]

    def histogram(self, name: str, text: str, bounds: Sequence[float]) -> Histogram:
        """A histogram without a label."""
        return self.histograms(name, text, "", ("",), bounds)[""]

    def counters(self, name: str, text: str, label: str, values: Iterable[str]) -> Family[Value]:
        """A counter for each value of a label."""
        return self._values("counter", name, text, label, values)

    def gauges(self, name: str, text: str, label: str, values: Iterable[str]) -> Family[Value]:
        """A gauge for each value of a label."""
        return self._values("gauge", name, text, label, values)

    def histograms(
        self, name: str, text: str, label: str, values: Iterable[str], bounds: Sequence[float]
    ) -> Family[Histogram]:
        """A histogram for each value of a label."""
        series = {value: Histogram(bounds) for value in values}
        family = Family(name, "histogram", text, label, series)
        self.families.append(family)
        return family

    def _values(
        self, kind: str, name: str, text: str, label: str, values: Iterable[str]
    ) -> Family[Value]:
        family = Family(name, kind, text, label, {value: Value() for value in values})
        self.families.append(family)
        return family

    def render(self) -> str:
        """Everything as text."""
        return "".join(line for family in self.families for line in family.lines())
