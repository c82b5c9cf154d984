import json
import re
from collections.abc import Iterable
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.fakes.tool_models import BARE, MODELS, format_of, tokens_of
from tests.router.tools.test_formats import TOOLS, WEATHER, matcher, said

from kagami_router.request.values import Token
from kagami_router.tools.call_arguments import JSON
from kagami_router.tools.deltas import (
    CallArguments,
    CallStart,
    Delta,
    TextDelta,
    TextOnly,
    new_call_id,
)
from kagami_router.tools.offers import AUTO, allowed_calls
from kagami_router.tools.parser import CallParser

# In these forms no marker is a special token: the whole answer is text.
TEXT_MODELS = (
    *("unaware", "llama-plain", "mistral-plain"),
    *(one for one in MODELS if one.endswith("-text")),
)
CALLS = (("now", "{}"), ("weather", WEATHER))


def parser_of(model: str, *, is_constrained: bool = True, is_parallel: bool = True) -> CallParser:
    calls = allowed_calls(TOOLS, AUTO, is_parallel=is_parallel)
    assert calls is not None
    ids = iter(range(100))
    return CallParser(
        format_of(model), calls, is_constrained=is_constrained, new_id=lambda: f"id{next(ids)}"
    )


def read(parser: CallParser, pieces: Iterable[str | Token], *, is_cut: bool = False) -> list[Delta]:
    deltas: list[Delta] = []
    for piece in pieces:
        deltas += parser.push_text(piece) if isinstance(piece, str) else parser.push(piece)
    return deltas + parser.finish(is_cut=is_cut)


def summed(deltas: list[Delta]) -> tuple[str, list[tuple[str, str, str]]]:
    """All text joined, and the calls as (id, name, arguments)."""
    text = "".join(delta.text for delta in deltas if isinstance(delta, TextDelta))
    starts = [delta for delta in deltas if isinstance(delta, CallStart)]
    assert [one.index for one in starts] == list(range(len(starts)))
    arguments = [""] * len(starts)
    for delta in deltas:
        if isinstance(delta, CallArguments):
            arguments[delta.index] += delta.text
    return text, [(one.id, one.name, each) for one, each in zip(starts, arguments, strict=True)]


def parts(text: str, cuts: Iterable[int]) -> list[str]:
    places = sorted({min(cut, len(text)) for cut in cuts} | {0, len(text)})
    return [text[begin:end] for begin, end in pairwise(places)]


def calls_in(model: str) -> tuple[tuple[str, str], ...]:
    return CALLS if format_of(model).form.between else CALLS[1:]


@pytest.mark.parametrize("is_constrained", [True, False])
@pytest.mark.parametrize("model", MODELS)
def test_calls_are_read_token_by_token(model: str, is_constrained: bool) -> None:
    calls = calls_in(model)
    tokens = tokens_of(MODELS[model][1], said(model, *calls))
    text, found = summed(read(parser_of(model, is_constrained=is_constrained), tokens))
    assert text == ""
    assert found == [(f"id{index}", *call) for index, call in enumerate(calls)]


@given(cuts=st.lists(st.integers(0, 200)), is_constrained=st.booleans(), data=st.data())
def test_any_split_gives_the_same(
    cuts: list[int], is_constrained: bool, data: st.DataObject
) -> None:
    model = data.draw(st.sampled_from(TEXT_MODELS))
    before = data.draw(st.sampled_from(["", "\n", "I look. ", "a <tool_cal", "[TOOL_", "{"]))
    before = "" if model in BARE else before
    text = before + said(model, *calls_in(model))
    whole = summed(read(parser_of(model, is_constrained=is_constrained), [text]))
    split = summed(read(parser_of(model, is_constrained=is_constrained), parts(text, cuts)))
    assert split == whole
    assert whole[0] == (before if before.strip() else "")
    assert [call[1:] for call in whole[1]] == list(calls_in(model))


_SCRAPS = st.sampled_from(
    (
        *(
            "<tool_call>",
            "</tool_call>",
            "[TOOL_CALLS]",
            "[",
            "]",
            ", ",
            "text",
            "é",
            "<",
            " ",
            "\n",
        ),
        *('{"name": "', "now", '", "arguments": ', '", "parameters": ', "{", "}", "{}", '"', "\\"),
    )
)


@given(scraps=st.lists(_SCRAPS, max_size=12), cuts=st.lists(st.integers(0, 100)), data=st.data())
def test_without_a_grammar_anything_is_read_and_split_does_not_matter(
    scraps: list[str], cuts: list[int], data: st.DataObject
) -> None:
    model = data.draw(st.sampled_from(TEXT_MODELS))
    is_cut = data.draw(st.booleans())
    text = "".join(scraps)
    whole = summed(read(parser_of(model, is_constrained=False), [text], is_cut=is_cut))
    pieces = parts(text, cuts)
    assert summed(read(parser_of(model, is_constrained=False), pieces, is_cut=is_cut)) == whole
    if not whole[1]:
        assert whole[0] == text
    elif not is_cut:
        assert all(isinstance(json.loads(call[2]), dict) for call in whole[1])


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    "text", ["Hello", "{", '{"a": 1}', "[1]", "<tool", "  x ", "\n", "a\n<b", '{"name": "Ada"}', ""]
)
def test_text_stays_as_it_is(model: str, text: str) -> None:
    deltas = read(parser_of(model), tokens_of(MODELS[model][1], text))
    assert summed(deltas) == (text, [])


@pytest.mark.parametrize("model", [one for one in TEXT_MODELS if format_of(one).form.style is JSON])
@pytest.mark.parametrize(
    ("name", "arguments"), [("unknown", "{}"), ("now", "{bad}"), ("now", "3"), ("now", '{"a": }')]
)
def test_a_malformed_call_is_text(model: str, name: str, arguments: str) -> None:
    text = said(model, (name, arguments))
    assert summed(read(parser_of(model, is_constrained=False), text)) == (text, [])


def test_a_call_that_is_not_closed_is_text_without_a_grammar() -> None:
    text = '<tool_call>\n{"name": "now", "arguments": {'
    assert summed(read(parser_of("unaware", is_constrained=False), [text])) == (text, [])


@pytest.mark.parametrize("is_constrained", [True, False])
def test_a_cut_call_is_returned_as_far_as_it_goes(is_constrained: bool) -> None:
    text = '<tool_call>\n{"name": "weather", "arguments": {"city": "Ro'
    parser = parser_of("unaware", is_constrained=is_constrained)
    assert summed(read(parser, text, is_cut=True)) == ("", [("id0", "weather", '{"city": "Ro')])


def test_a_cut_opener_of_a_next_call_is_not_text() -> None:
    text = said("unaware", ("now", "{}")) + "\n<tool_call"
    assert summed(read(parser_of("unaware"), [text], is_cut=True)) == ("", [("id0", "now", "{}")])


def test_a_forgotten_closer_is_forgiven() -> None:
    text = '<tool_call>\n{"name": "now", "arguments": {}}'
    assert summed(read(parser_of("qwen", is_constrained=False), [text]))[1] == [
        ("id0", "now", "{}")
    ]


def test_text_behind_calls_is_text() -> None:
    text = said("unaware", ("now", "{}")) + "\n\nThat was it."
    assert summed(read(parser_of("unaware", is_constrained=False), text))[0] == "\n\nThat was it."


@pytest.mark.parametrize("model", ["unaware", "hermes-special", "mistral", "mistral-args"])
def test_one_call_more_than_allowed_is_text(model: str) -> None:
    parser = parser_of(model, is_constrained=False, is_parallel=False)
    tokens = tokens_of(MODELS[model][1], said(model, ("now", "{}"), ("now", '{"a": 1}')))
    text, calls = summed(read(parser, tokens))
    assert len(calls) == 1
    assert '{"a": 1}' in text


def test_arguments_go_out_as_they_grow() -> None:
    parser = parser_of("unaware")
    assert parser.push_text('<tool_call>\n{"name": "weather", "arguments": ') == []
    assert parser.push_text('{"ci') == [CallStart(0, "id0", "weather"), CallArguments(0, '{"ci')]
    assert parser.push_text('ty": "}') == [CallArguments(0, 'ty": "}')]


def test_text_goes_out_at_once_unless_a_marker_may_begin() -> None:
    parser = parser_of("unaware")
    assert parser.push_text("Hi ") == [TextDelta("Hi ")]
    assert parser.push_text("a<to") == [TextDelta("a")]
    assert parser.push_text("ad>") == [TextDelta("<toad>")]


def test_a_special_marker_is_seen_behind_text_that_it_freed() -> None:
    parser = parser_of("mistral")
    marker = tokens_of(MODELS["mistral"][1], "[TOOL_CALLS]")[0]
    assert parser.push(marker, "held ") == [TextDelta("held ")]
    assert parser.push_text('[{"name": "now", "arguments": {}}]')[0] == CallStart(0, "id0", "now")


def test_a_special_markers_text_is_not_the_marker() -> None:
    text = said("mistral", ("now", "{}"))
    assert summed(read(parser_of("mistral", is_constrained=False), [text])) == (text, [])


def test_other_special_tokens_are_no_text() -> None:
    eos = Token(256, "<eos>", -0.5, True)
    assert read(parser_of("qwen"), [eos]) == []
    assert TextOnly().push(eos, "held") == [TextDelta("held")]


def test_ids_are_unique_and_have_nine_letters_and_digits() -> None:
    ids = {new_call_id() for _ in range(1000)}
    assert len(ids) == 1000
    assert all(re.fullmatch("[A-Za-z0-9]{9}", one) for one in ids)


@pytest.mark.parametrize("model", MODELS)
def test_what_the_grammar_lets_through_the_parser_understands(model: str) -> None:
    text = said(model, *calls_in(model))
    tokens = tokens_of(MODELS[model][1], text)
    assert matcher(model).try_consume_tokens([token.id for token in tokens]) == len(tokens)
    assert len(summed(read(parser_of(model), tokens))[1]) == len(calls_in(model))


@pytest.mark.parametrize("text", [" <tool_call>", "\n<tool_call>\n{}", "\n\n<tool_call>x"])
def test_white_space_before_text_that_is_no_call_is_sent(text: str) -> None:
    assert summed(read(parser_of("unaware", is_constrained=False), text)) == (text, [])


def test_a_list_that_goes_on_with_no_call_is_text_from_there() -> None:
    text = said("mistral-plain", ("now", "{}"), ("unknown", "{}"))
    found = summed(read(parser_of("mistral-plain", is_constrained=False), text))
    assert found == (', {"name": "unknown", "arguments": {}}]', [("id0", "now", "{}")])


@pytest.mark.parametrize("is_constrained", [True, False])
@pytest.mark.parametrize("model", [one for one in MODELS if format_of(one).form.between])
def test_a_call_that_was_made_before_is_not_shown_and_ends_the_answer(
    model: str, is_constrained: bool
) -> None:
    calls = (("now", "{}"), ("weather", WEATHER), ("now", "{}"), ("weather", '{"city": "Oslo"}'))
    parser = parser_of(model, is_constrained=is_constrained)
    text, found = summed(read(parser, tokens_of(MODELS[model][1], said(model, *calls))))
    assert parser.is_over
    assert text == ""
    assert found == [("id0", *calls[0]), ("id1", *calls[1])]


@pytest.mark.parametrize("is_constrained", [True, False])
@pytest.mark.parametrize("model", [one for one in MODELS if format_of(one).form.between])
def test_calls_of_one_tool_with_other_arguments_are_all_shown(
    model: str, is_constrained: bool
) -> None:
    cities = ("Rome", "Romeo", "Rom", "Oslo")
    calls = [("weather", f'{{"city": "{city}"}}') for city in cities]
    parser = parser_of(model, is_constrained=is_constrained)
    text, found = summed(read(parser, tokens_of(MODELS[model][1], said(model, *calls))))
    assert not parser.is_over
    assert (text, [call[1:] for call in found]) == ("", calls)


def test_a_call_goes_out_when_it_differs_from_those_before() -> None:
    parser = parser_of("unaware")
    parser.push_text(said("unaware", ("weather", '{"city": "Rome"}')) + "\n<tool_call>\n")
    assert parser.push_text('{"name": "weather", "arguments": {"city": "Ro') == []
    assert parser.num_calls == 1
    assert parser.push_text("s") == [
        CallStart(1, "id1", "weather"),
        CallArguments(1, '{"city": "Ros'),
    ]


def test_the_beginning_of_a_call_made_before_is_not_shown_when_the_answer_is_cut() -> None:
    text = said("unaware", ("now", "{}")) + '\n<tool_call>\n{"name": "now", "arguments": {'
    assert summed(read(parser_of("unaware"), [text], is_cut=True)) == ("", [("id0", "now", "{}")])
