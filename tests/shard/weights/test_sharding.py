import pytest

from kagami_proto.errors import UnsupportedModel
from kagami_shard.weights.sharding import heads_of, padded_span_of, span_of, spans_in_sections


@pytest.mark.parametrize(("total", "size"), [(12, 3), (80, 6), (3, 4), (7, 1)])
def test_spans_follow_one_another_and_hold_everything(total: int, size: int) -> None:
    for cut in (span_of, padded_span_of):
        spans = [cut(total, rank, size) for rank in range(size)]
        assert [i for start, stop in spans for i in range(start, stop)] == list(range(total))


def test_padded_spans_are_as_long_as_the_first() -> None:
    assert [padded_span_of(100, rank, 3) for rank in range(3)] == [(0, 34), (34, 68), (68, 100)]


def test_spans_of_sections_are_counted_from_the_first_section() -> None:
    assert spans_in_sections([(2, 4), (0, 1)], [10, 5]) == [(2, 4), (10, 11)]


@pytest.mark.parametrize(
    ("num_kv_heads", "size", "rank", "queries", "keys", "copies"),
    [
        (4, 1, 0, (0, 8), (0, 4), 1),
        (4, 2, 1, (4, 8), (2, 4), 1),
        (4, 4, 3, (6, 8), (3, 4), 1),
        (2, 4, 1, (2, 4), (0, 1), 2),
        (2, 8, 5, (5, 6), (1, 2), 4),
        (1, 8, 7, (7, 8), (0, 1), 8),
    ],
)
def test_a_rank_has_its_queries_and_the_keys_they_look_at(
    num_kv_heads: int,
    size: int,
    rank: int,
    queries: tuple[int, int],
    keys: tuple[int, int],
    copies: int,
) -> None:
    assert heads_of("x", 8, num_kv_heads, rank, size) == (queries, keys, copies)


@pytest.mark.parametrize(("num_heads", "num_kv_heads", "size"), [(9, 3, 2), (12, 3, 2), (6, 6, 4)])
def test_numbers_that_do_not_divide_are_refused(
    num_heads: int, num_kv_heads: int, size: int
) -> None:
    with pytest.raises(UnsupportedModel, match=f"and `num_shards`: {size}"):
        heads_of("x", num_heads, num_kv_heads, 0, size)
