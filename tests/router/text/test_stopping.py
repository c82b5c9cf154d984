"""Stop strings in text that is split into tokens in any way."""

import time
import tracemalloc

from hypothesis import given
from hypothesis import strategies as st

from kagami_router.text.stopping import StopMatcher


def outcome(pieces: list[str], stop: list[str], *, keep_stop: bool) -> tuple[list[str], bool]:
    """The released texts, the rest last; and whether a stop string ended the text."""
    matcher = StopMatcher(stop, keep_stop=keep_stop)
    out = []
    for piece in pieces:
        text, is_stopped = matcher.push(piece)
        out.append(text)
        if is_stopped:
            return [*out, matcher.rest()], True
    return [*out, matcher.rest()], False


def expected(text: str, stop: list[str], *, keep_stop: bool) -> tuple[str, bool]:
    """The same by definition: the end is the first character that completes a stop string."""
    for end in range(1, len(text) + 1):
        complete = [each for each in stop if each and text[:end].endswith(each)]
        if complete:
            return (text[:end] if keep_stop else text[: end - max(map(len, complete))]), True
    return text, False


def test_a_stop_string_across_tokens_is_cut_off() -> None:
    assert outcome(["ab", "cd", "ef"], ["cde"], keep_stop=False) == (["ab", "", "", ""], True)


def test_a_stop_string_that_is_not_cut_off_ends_the_text() -> None:
    assert outcome(["ab", "cd", "ef"], ["cde"], keep_stop=True) == (["ab", "cd", "e", ""], True)


def test_what_did_not_become_a_stop_string_comes_late() -> None:
    assert outcome(["a", "b", "x"], ["abc"], keep_stop=False) == (["", "", "abx", ""], False)


def test_what_is_held_back_at_the_end_is_the_rest() -> None:
    assert outcome(["xa", "b"], ["abc"], keep_stop=False) == (["x", "", "ab"], False)


def test_of_two_complete_at_once_the_longer_is_cut() -> None:
    assert outcome(["xabc"], ["c", "abc"], keep_stop=False) == (["x", ""], True)


def test_the_stop_string_that_was_found_is_known() -> None:
    matcher = StopMatcher(["x", "cd", "bcd"], keep_stop=False)
    matcher.push("abc")
    assert matcher.found is None
    matcher.push("d")
    assert matcher.found == "bcd"


def test_an_empty_stop_string_means_nothing() -> None:
    assert outcome(["abc"], [""], keep_stop=False) == (["abc", ""], False)


def test_a_special_token_can_complete_a_stop_string_and_is_not_shown() -> None:
    matcher = StopMatcher(["b<end>"], keep_stop=False)
    assert matcher.push("ab") == ("a", False)
    assert matcher.push("<end>", is_shown=False) == ("", True)


def test_a_special_token_that_completes_nothing_frees_what_is_held_and_is_not_shown() -> None:
    matcher = StopMatcher(["b<end>!"], keep_stop=False)
    assert matcher.push("ab") == ("a", False)
    assert matcher.push("<end>", is_shown=False) == ("", False)
    assert matcher.push("?") == ("b?", False)
    assert matcher.push("b") == ("", False)
    assert matcher.push("<end>", is_shown=False) == ("", False)
    assert matcher.rest() == "b"


def test_a_stop_string_as_long_as_a_body_costs_no_more_than_what_matches() -> None:
    stop = "b" * 1_990_000
    tracemalloc.start()
    begin = time.process_time()
    matcher = StopMatcher([stop], keep_stop=False)
    held = [matcher.push("b" * 4)[0] for _ in range(1000)]
    spent, (_, peak) = time.process_time() - begin, tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert not any(held)
    assert matcher.push("c") == ("b" * 4000 + "c", False)
    assert peak < 2_000_000
    assert spent < 1.0


texts = st.text("ab\u3042", max_size=6)


@given(st.lists(texts, max_size=12), st.lists(texts, max_size=4), st.booleans())
def test_the_cut_into_tokens_does_not_matter(
    pieces: list[str], stop: list[str], keep_stop: bool
) -> None:
    out, is_stopped = outcome(pieces, stop, keep_stop=keep_stop)
    assert ("".join(out), is_stopped) == expected("".join(pieces), stop, keep_stop=keep_stop)


@given(st.lists(texts, max_size=12), st.lists(texts, max_size=4))
def test_nothing_is_held_back_that_cannot_become_a_stop_string(
    pieces: list[str], stop: list[str]
) -> None:
    matcher = StopMatcher(stop, keep_stop=False)
    shown = ""
    for end, piece in enumerate(pieces, 1):
        text, is_stopped = matcher.push(piece)
        shown += text
        if is_stopped:
            return
        held = "".join(pieces[:end])[len(shown) :]
        assert not held or any(each.startswith(held) and each != held for each in stop)
