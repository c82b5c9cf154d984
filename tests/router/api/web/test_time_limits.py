import pytest

from kagami_router.api.web.time_limits import MIN_RATE, Patience, TimeLimits, Wait

LIMITS = TimeLimits(head_s=10, body_s=30, idle_s=75, answer_s=60)
FOREVER = 100_000


def ticks_until_over(wait: Wait, bytes_each_tick: int = 0) -> int | None:
    """How many ticks a connection is waited for; a tick of `LIMITS` is a second."""
    patience = Patience(LIMITS)
    for tick in range(FOREVER):
        if patience.is_over(wait, 0, tick * bytes_each_tick):
            return tick
    return None


@pytest.mark.parametrize(
    ("wait", "ticks"), [(Wait.HEAD, 10), (Wait.BODY, 30), (Wait.IDLE, 75), (Wait.ANSWER, 60)]
)
def test_each_wait_has_its_limit(wait: Wait, ticks: int) -> None:
    assert LIMITS.tick_s == 1
    assert ticks_until_over(wait) == ticks


def test_a_running_handler_has_none() -> None:
    assert ticks_until_over(Wait.HANDLER) is None


@pytest.mark.parametrize(("wait", "ticks"), [(Wait.BODY, 30), (Wait.ANSWER, 60)])
def test_what_moves_in_drops_stands_still(wait: Wait, ticks: int) -> None:
    assert ticks_until_over(wait, bytes_each_tick=MIN_RATE - 1) == ticks


@pytest.mark.parametrize("wait", [Wait.BODY, Wait.ANSWER])
def test_what_moves_slowly_is_waited_for(wait: Wait) -> None:
    assert ticks_until_over(wait, bytes_each_tick=MIN_RATE) is None


def test_a_fast_body_that_stops_is_waited_for_as_long_as_any() -> None:
    patience = Patience(LIMITS)
    assert [patience.is_over(Wait.BODY, 0, 1_000_000) for _ in range(31)] == [False] * 30 + [True]


def test_each_request_of_a_connection_begins_anew() -> None:
    patience = Patience(LIMITS)
    waits = [patience.is_over(Wait.IDLE, number, 0) for number in range(9) for _ in range(75)]
    assert not any(waits)


def test_a_short_limit_is_looked_at_more_often() -> None:
    assert TimeLimits(head_s=0.8).tick_s == pytest.approx(0.1)
