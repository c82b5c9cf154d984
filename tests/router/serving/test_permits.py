import pytest

from kagami_proto.errors import Overloaded
from kagami_router.serving.permits import Permits


def test_a_permit_comes_back_whatever_happens() -> None:
    permits = Permits(2)
    with pytest.raises(ZeroDivisionError), permits.take(2):
        raise ZeroDivisionError
    assert permits.are_all_free


def test_more_than_are_free_are_refused_and_take_nothing() -> None:
    permits = Permits(2)
    with permits.take():
        assert not permits.are_all_free
        with pytest.raises(Overloaded), permits.take(2):
            pass
        with permits.take():
            pass
    assert permits.are_all_free
