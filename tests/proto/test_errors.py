from collections.abc import Iterator

import pytest

from kagami_proto import errors
from kagami_proto.errors import TABLE, KagamiError, row_of


def tree(root: type[KagamiError] = KagamiError) -> Iterator[type[KagamiError]]:
    """Every class of the tree, the root first."""
    yield root
    for child in root.__subclasses__():
        yield from tree(child)


def test_the_docstring_draws_the_whole_tree() -> None:
    drawn = [
        line.strip("│├└─ ").split()[0]
        for line in (errors.__doc__ or "").split("```")[1].strip().splitlines()
    ]
    assert sorted(drawn) == sorted(
        error.__name__ for error in tree() if error.__module__ == errors.__name__
    )


def test_the_table_has_only_errors_of_the_tree() -> None:
    assert set(TABLE) < set(tree())


@pytest.mark.parametrize(
    ("error", "row"),
    [
        (errors.ShardLost("x"), TABLE[errors.GenerationFailed]),
        (errors.TemplateError("x"), TABLE[errors.TemplateError]),
        (errors.Overloaded("x"), TABLE[errors.Overloaded]),
        (ValueError("x"), None),
    ],
)
def test_the_nearest_ancestor_says_what_an_error_becomes(
    error: BaseException, row: errors.ErrorRow | None
) -> None:
    assert row_of(error) is row


@pytest.mark.parametrize(
    ("error", "kind", "status"),
    [
        (errors.InvalidRequest, "validation", 422),
        (errors.Overloaded, "overloaded", 429),
        (errors.GenerationFailed, "generation", 424),
        (errors.IncompleteGeneration, "incomplete_generation", 500),
        (errors.BodyTooLarge, "validation", 413),
    ],
)
def test_kinds_and_statuses_are_tgis(error: type[KagamiError], kind: str, status: int) -> None:
    assert (TABLE[error].kind, TABLE[error].status) == (kind, status)
