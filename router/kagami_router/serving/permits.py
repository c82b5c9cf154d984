"""How many calls may run at once. More are refused at once; nobody waits."""

from collections.abc import Iterator
from contextlib import contextmanager

from kagami_proto.errors import Overloaded


class Permits:
    """A number of permits; a call holds one while it runs."""

    def __init__(self, count: int) -> None:
        self._num_free = count

    @contextmanager
    def take(self) -> Iterator[None]:
        """Hold a permit. Never waits; raises `Overloaded` if none is free."""
        if not self._num_free:
            raise Overloaded("Model is overloaded")
        self._num_free -= 1
        try:
            yield
        finally:
            self._num_free += 1
