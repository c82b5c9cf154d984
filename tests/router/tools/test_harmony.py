"""gpt-oss: messages on channels, read at every cut and held to a grammar."""

from collections.abc import Iterable

import pytest
from llguidance import LLMatcher, LLTokenizer
from tests.fakes.byte_tokenizer import EOS
from tests.fakes.tool_models import Described, tokens_of, vocabulary
from tests.router.tools.test_formats import TOOLS, WEATHER, accepts

from kagami_proto.values import Grammar, GrammarKind
from kagami_router.request.values import Token
from kagami_router.tools.answer_form import AnswerForm, Opening, Wanted
from kagami_router.tools.deltas import CallArguments, CallStart, Delta, ReasoningDelta, TextDelta
from kagami_router.tools.formats import find_format
from kagami_router.tools.harmony import MARKERS, HarmonyParser, find_harmony
from kagami_router.tools.offers import AUTO, REQUIRED, AllowedCalls, ToolChoice, allowed_calls

VOCABULARY = vocabulary(*MARKERS)
TEMPLATE = Described("{{ tools }}<|start|><|channel|><|message|>")
PROMPT = "<|start|>user<|message|>Hi<|end|><|start|>assistant"
THOUGHT = "<|channel|>analysis<|message|>Hm: 1 < 2.<|end|><|start|>assistant"
REMARK = "<|channel|>commentary<|message|>I look.<|end|><|start|>assistant"
CALL = f"<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{WEATHER}"
NOW = "<|channel|>commentary to=functions.now <|constrain|>json<|message|>{}"
FINAL = "<|channel|>final<|message|>It is."
SCHEMA = Grammar(GrammarKind.JSON_SCHEMA, '{"type": "array", "items": {"type": "integer"}}')


def calls_of(choice: ToolChoice = AUTO) -> AllowedCalls:
    found = allowed_calls(TOOLS, choice, is_parallel=True)
    assert found is not None
    return found


def parser_of(*, begun: str = "", is_constrained: bool = True) -> HarmonyParser:
    return HarmonyParser(begun, calls_of(), is_constrained=is_constrained, new_id=lambda: "id")


def summed(deltas: Iterable[Delta]) -> tuple[str, str, list[tuple[str, str]]]:
    """Thoughts, text, and the calls."""
    thoughts, text = "", ""
    calls: list[tuple[str, str]] = []
    for delta in deltas:
        match delta:
            case ReasoningDelta(more):
                thoughts += more
            case TextDelta(more):
                text += more
            case CallStart(index, _, name):
                assert index == len(calls)
                calls.append((name, ""))
            case CallArguments(index, more):
                calls[index] = (calls[index][0], calls[index][1] + more)
    return thoughts, text, calls


def read(parser: HarmonyParser, tokens: Iterable[Token], *, is_cut: bool = False) -> list[Delta]:
    deltas = [delta for token in tokens for delta in parser.push(token)]
    return deltas + parser.finish(is_cut=is_cut)


RECORDED = [
    (f"{THOUGHT}{FINAL}<|return|>", ("Hm: 1 < 2.", "It is.", [])),
    (f"{FINAL}<|return|>", ("", "It is.", [])),
    (f"{THOUGHT}{REMARK}{CALL}<|call|>", ("Hm: 1 < 2.", "I look.", [("weather", WEATHER)])),
    (f"{REMARK}{FINAL}<|return|>", ("", "I look.\nIt is.", [])),
    (f"{THOUGHT}{THOUGHT}{FINAL}", ("Hm: 1 < 2.\nHm: 1 < 2.", "It is.", [])),
    (
        f" to=functions.weather<|channel|>commentary json<|message|>{WEATHER}<|call|>",
        ("", "", [("weather", WEATHER)]),
    ),
    ("<|channel|>commentary to=functions.no json<|message|>{}<|call|>", ("", "{}", [])),
    ("<|channel|>analysis to=python code<|message|>1+1<|call|>", ("1+1", "", [])),
    ("No channel at all.", ("", "No channel at all.", [])),
]


@pytest.mark.parametrize("is_constrained", [True, False])
@pytest.mark.parametrize(("said", "expected"), RECORDED)
def test_recorded_answers_are_taken_apart(
    said: str, expected: tuple[str, str, list[tuple[str, str]]], is_constrained: bool
) -> None:
    parser = parser_of(is_constrained=is_constrained)
    assert summed(read(parser, tokens_of(VOCABULARY, said))) == expected


@pytest.mark.parametrize(("said", "expected"), RECORDED)
def test_an_answer_that_is_cut_anywhere_is_the_beginning_of_the_whole(
    said: str, expected: tuple[str, str, list[tuple[str, str]]]
) -> None:
    tokens = tokens_of(VOCABULARY, said)
    for count in range(len(tokens)):
        thoughts, text, calls = summed(read(parser_of(), tokens[:count], is_cut=True))
        assert expected[0].startswith(thoughts)
        assert expected[1].startswith(text)
        assert all(
            whole[1].startswith(one[1]) for one, whole in zip(calls, expected[2], strict=False)
        )


def test_thoughts_are_counted_with_their_header() -> None:
    parser = parser_of()
    tokens = tokens_of(VOCABULARY, f"{THOUGHT}{FINAL}<|return|>")
    read(parser, tokens)
    assert parser.num_reasoning_tokens == len(
        tokens_of(VOCABULARY, "<|channel|>analysis<|message|>Hm: 1 < 2.")
    )


def test_what_the_prompt_has_begun_goes_on() -> None:
    parser = parser_of(begun="<|channel|>analysis<|message|>Hm")
    tokens = tokens_of(VOCABULARY, f", so.<|end|><|start|>assistant{FINAL}")
    assert summed(read(parser, tokens)) == (", so.", "It is.", [])


def test_a_call_that_is_no_json_is_text_without_a_grammar() -> None:
    tokens = tokens_of(VOCABULARY, NOW.replace("{}", "{bad}") + "<|call|>")
    assert summed(read(parser_of(is_constrained=False), tokens)) == ("", "{bad}", [])


def test_a_call_that_was_made_before_ends_the_answer() -> None:
    parser = parser_of()
    tokens = tokens_of(VOCABULARY, f"{NOW}<|call|><|start|>assistant{NOW}<|call|>")
    assert summed(read(parser, tokens)) == ("", "", [("now", "{}")])
    assert parser.is_over


def form() -> AnswerForm:
    found = find_harmony(TEMPLATE.source, VOCABULARY, find_format(TEMPLATE, VOCABULARY))
    assert found is not None
    return found


def test_the_form_needs_the_template_and_the_tokens() -> None:
    tool_format = find_format(TEMPLATE, vocabulary())
    assert find_harmony(TEMPLATE.source, vocabulary(), tool_format) is None
    assert find_harmony("{{ messages }}", VOCABULARY, tool_format) is None


@pytest.mark.parametrize(
    ("said", "choice", "response", "is_held"),
    [
        (f"{THOUGHT}{CALL}", REQUIRED, None, True),
        (f"{THOUGHT}{REMARK}{NOW}", REQUIRED, None, True),
        (CALL.replace("Rome", '"'), REQUIRED, None, False),
        (CALL.replace('"days": 3', '"days": "3"'), AUTO, None, False),
        (f"{THOUGHT}{FINAL}", REQUIRED, None, False),
        (f"{THOUGHT}{FINAL}", AUTO, None, True),
        (f"{THOUGHT}{CALL}", AUTO, None, True),
        (f"{THOUGHT}<|channel|>final<|message|>[1, 2]", None, SCHEMA, True),
        ("<|channel|>final <|constrain|>JSON<|message|>[1, 2]", None, SCHEMA, True),
        (f"{THOUGHT}{FINAL}", None, SCHEMA, False),
        ("<|channel|>final<|message|>[1, 2]", AUTO, SCHEMA, True),
        (CALL, AUTO, SCHEMA, True),
        (FINAL, AUTO, SCHEMA, False),
        (f"{REMARK}<|channel|>final<|message|>[1, 2]", None, SCHEMA, False),
        (
            f"<|channel|>analysis<|message|>Hm{FINAL}<|end|><|start|>assistant{NOW}",
            AUTO,
            None,
            False,
        ),
    ],
)
def test_each_channel_is_held_to_what_is_asked(
    said: str, choice: ToolChoice | None, response: Grammar | None, is_held: bool
) -> None:
    wanted = Wanted(calls_of(choice) if choice else None, response, has_grammars=True)
    grammar = form().reading(Opening(PROMPT), wanted).grammar
    assert grammar is not None
    made = LLMatcher(
        LLTokenizer(VOCABULARY.to_str(), eos_token=EOS),
        LLMatcher.grammar_from_lark(grammar.source),
        log_level=0,
    )
    assert not made.is_error(), made.get_error()
    assert accepts(made, VOCABULARY, said) is is_held


def test_without_tools_and_form_an_answer_is_free_and_read() -> None:
    reading = form().reading(Opening(PROMPT), Wanted(None, None, has_grammars=True))
    assert reading.grammar is None
    deltas = read(reading.new_parser(), tokens_of(VOCABULARY, f"{THOUGHT}{FINAL}<|return|>"))
    assert summed(deltas) == ("Hm: 1 < 2.", "It is.", [])
