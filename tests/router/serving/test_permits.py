import pytest

from kagami_proto.errors import Overloaded
from kagami_router.serving.permits import Permits


def test_a_permit_comes_back_whatever_happens() -> None:
    permits = Permits(1)
    with pytest.raises(ZeroDivisionError), permits.take():
        raise ZeroDivisionError
    with permits.take():
        pass


def test_more_than_there_are_are_refused() -> None:
    permits = Permits(2)
    with permits.take(), permits.take():
        with pytest.raises(Overloaded), permits.take():
            pass
    with permits.take(), permits.take():
        pass
