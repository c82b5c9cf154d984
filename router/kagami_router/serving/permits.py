"""How many calls may run at once. More are refused at once; nobody waits."""

from collections.abc import Iterator
from contextlib import contextmanager

from kagami_proto.errors import Overloaded


class Permits:
    """A number of permits; a call holds one or more while it runs."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._num_free = count

    @property
    def are_all_free(self) -> bool:
        return self._num_free == self._count

    @contextmanager
    def take(self, count: int = 1) -> Iterator[None]:
        """Hold `count` permits. Never waits; raises `Overloaded` if fewer are free."""
        if count > self._num_free:
            raise Overloaded("Model is overloaded")
        self._num_free -= count
        try:
            yield
        finally:
            self._num_free += count
