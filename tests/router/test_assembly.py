"""What arguments and facts make of a server's limits."""

import pytest

from kagami_router.assembly import StartError, cache_grows_to, plan_limits
from kagami_router.cli import parse


@pytest.mark.parametrize(
    ("flags", "positions", "pool", "expected"),
    [
        ([], 2048, 10_000, (2047, 2048)),
        ([], 2048, 1000, (999, 1000)),
        ([], 0, 1000, (999, 1000)),
        (["--max-total-tokens", "512"], 2048, 1000, (511, 512)),
        (["--max-total-tokens", "512", "--max-input-tokens", "100"], 2048, 1000, (100, 512)),
    ],
)
def test_limits(flags: list[str], positions: int, pool: int, expected: tuple[int, int]) -> None:
    limits = plan_limits(parse(flags, {}), max_positions=positions, pool_tokens=pool, vocab_size=9)
    assert (limits.max_input_tokens, limits.max_total_tokens) == expected


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--max-total-tokens", "2000"], "Not enough memory to handle `max_total_tokens=2000`"),
        (["--max-input-tokens", "1000"], "`max_input_tokens` must be < `max_total_tokens`"),
    ],
)
def test_limits_that_cannot_be(flags: list[str], text: str) -> None:
    with pytest.raises(StartError, match=text):
        plan_limits(parse(flags, {}), max_positions=2048, pool_tokens=1000, vocab_size=9)


@pytest.mark.parametrize(
    ("flags", "share", "expected"),
    [
        ([], 0.25, 200),
        (["--max-batch-total-tokens", "1000"], 0.25, None),
        ([], 1.0, None),
    ],
)
def test_cached_prefixes_take_memory_up_to_the_devices_share_of_the_pool(
    flags: list[str], share: float, expected: int | None
) -> None:
    assert cache_grows_to(parse(flags, {}), 800, share) == expected
