import asyncio

import pytest
from tests.fakes.panics import panicking_tokenizer

from kagami_proto.panics import LibraryPanicked, exception_of


def test_a_panic_becomes_an_exception_that_says_what_the_library_said() -> None:
    tokenizer = panicking_tokenizer()
    with pytest.raises(BaseException, match="slice index") as raised:
        tokenizer.decode(tokenizer.encode("a").ids)
    assert not isinstance(raised.value, Exception)
    error = exception_of(raised.value)
    assert isinstance(error, LibraryPanicked)
    assert "slice index" in str(error)


def test_an_exception_stays_what_it_is() -> None:
    error = ValueError("no")
    assert exception_of(error) is error


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, asyncio.CancelledError])
def test_what_ends_a_task_or_the_process_passes(kind: type[BaseException]) -> None:
    with pytest.raises(kind):
        exception_of(kind())
