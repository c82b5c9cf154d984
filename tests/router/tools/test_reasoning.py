from collections.abc import Iterable

import pytest
from llguidance import LLMatcher, LLTokenizer
from tests.fakes.byte_tokenizer import EOS
from tests.fakes.tool_models import Described, tokens_of, vocabulary
from tests.router.tools.test_formats import TOOLS, accepts

from kagami_proto.values import Grammar, GrammarKind
from kagami_router.request.values import Token
from kagami_router.tools.answer_grammar import Thoughts, answer_grammar
from kagami_router.tools.deltas import (
    AnswerParser,
    CallStart,
    Delta,
    ReasoningDelta,
    TextDelta,
    TextOnly,
)
from kagami_router.tools.formats import find_format
from kagami_router.tools.offers import AUTO, REQUIRED, ToolChoice, allowed_calls
from kagami_router.tools.parser import CallParser
from kagami_router.tools.reasoning import (
    FORMS,
    Begun,
    ReasoningFormat,
    ReasoningParser,
    find_reasoning,
)

BY_NAME = {one.name: one for one in FORMS}
THINK = BY_NAME["think"]
QWEN3 = Described("{{ tools }}<tool_call></tool_call> <think> </think>")


def read(
    parser: AnswerParser, pieces: Iterable[str | Token], *, is_cut: bool = False
) -> list[Delta]:
    deltas: list[Delta] = []
    for piece in pieces:
        deltas += parser.push_text(piece) if isinstance(piece, str) else parser.push(piece)
    return deltas + parser.finish(is_cut=is_cut)


def summed(deltas: Iterable[Delta]) -> tuple[str, str, list[str]]:
    """Thoughts, text, and the names of the calls."""
    thoughts, text, calls = "", "", []
    for delta in deltas:
        match delta:
            case ReasoningDelta(more):
                assert (text, calls) == ("", []), "thoughts come first"
                thoughts += more
            case TextDelta(more):
                text += more
            case CallStart(_, _, name):
                calls.append(name)
    return thoughts, text, calls


# What models of each form write, and what is read.
RECORDED = [
    ("think", "<think>\nIt is 2 + 2.\n</think>\n\nIt is 4.", "It is 2 + 2.", "It is 4."),
    ("think", "\n<think>a < b</think>c", "a < b", "c"),
    ("think", "<think>\n\n</think>\n\nIt is 4.", "", "It is 4."),
    ("think", "No thought. <think>x</think>", "", "No thought. <think>x</think>"),
    ("think", "<thin", "", "<thin"),
    ("mistral", "[THINK]Hm.\n[/THINK]4", "Hm.", "4"),
    ("cohere", "<|START_THINKING|>Hm.<|END_THINKING|>4", "Hm.", "4"),
    ("seed_oss", "<seed:think>Hm.</seed:think>4", "Hm.", "4"),
    ("kimi", "◁think▷Hm.◁/think▷4", "Hm.", "4"),
    ("gemma4", "<|channel>thought\nHm.\n<channel|>4", "Hm.", "4"),
    ("granite", "Here is my thought process: Hm.\nHere is my response: 4", "Hm.", "4"),
    ("deepseek_r1", "Hm.\n</think>\n4", "Hm.", "4"),
]


@pytest.mark.parametrize(("name", "said", "thought", "text"), RECORDED)
def test_recorded_thoughts_are_read_at_every_cut(
    name: str, said: str, thought: str, text: str
) -> None:
    form = BY_NAME[name]
    begun = Begun.OPEN if form.is_implied else Begun.NOTHING
    cuts = [[said], list(said), *([said[:at], said[at:]] for at in range(1, len(said)))]
    for pieces in cuts:
        assert summed(read(ReasoningParser(form, TextOnly(), begun), pieces)) == (thought, text, [])


@pytest.mark.parametrize("is_special", [True, False])
def test_markers_that_are_tokens_are_read(is_special: bool) -> None:
    markers = ("<think>", "</think>")
    tokenizer = vocabulary(*markers) if is_special else vocabulary(plain=markers)
    parser = ReasoningParser(THINK, TextOnly())
    tokens = tokens_of(tokenizer, "<think>\nWhy?\n</think>\n\nSo.")
    assert summed(read(parser, tokens)) == ("Why?", "So.", [])
    assert parser.num_reasoning_tokens == len("\nWhy?\n") + 2


def test_a_special_token_and_text_behind_it_are_one_marker() -> None:
    parser = ReasoningParser(BY_NAME["gemma4"], TextOnly())
    tokens = tokens_of(vocabulary("<|channel>", "<channel|>"), "<|channel>thought\nHm.<channel|>4")
    assert summed(read(parser, tokens)) == ("Hm.", "4", [])


@pytest.mark.parametrize(
    ("begun", "said", "expected"),
    [
        (Begun.OPEN, "Hm.</think>4", ("Hm.", "4", [])),
        (Begun.OPEN, "Hm. <think>", ("Hm. <think>", "", [])),
        (Begun.OPEN, "<think>\nHm.</think>4", ("Hm.", "4", [])),
        (Begun.OPEN, "<thi", ("<thi", "", [])),
        (Begun.CLOSED, "<think>Hm.", ("", "<think>Hm.", [])),
    ],
)
def test_what_the_prompt_has_begun_goes_on(
    begun: Begun, said: str, expected: tuple[str, str, list[str]]
) -> None:
    assert summed(read(ReasoningParser(THINK, TextOnly(), begun), said)) == expected


def test_thoughts_that_are_cut_are_thoughts() -> None:
    parser = ReasoningParser(THINK, TextOnly())
    assert summed(read(parser, "<think>So it is </thi", is_cut=True)) == ("So it is </thi", "", [])
    assert parser.num_reasoning_tokens == 0  # no token was pushed


def test_thoughts_arrive_while_the_model_thinks() -> None:
    parser = ReasoningParser(THINK, TextOnly())
    assert parser.push_text("<think>\nFirst") == [ReasoningDelta("First")]
    assert parser.push_text(" second\n</") == [ReasoningDelta(" second")]
    assert parser.push_text("b>") == [ReasoningDelta("\n</b>")]


def calls_parser(*, is_special: bool, ends_at: str = "<tool_call>") -> ReasoningParser:
    calls = allowed_calls(TOOLS, AUTO, is_parallel=True)
    assert calls is not None
    markers = ("<tool_call>", "</tool_call>")
    tokenizer = vocabulary(*markers) if is_special else vocabulary(plain=markers)
    rest = CallParser(find_format(QWEN3, tokenizer), calls, is_constrained=True)
    return ReasoningParser(THINK, rest, ends_at=ends_at)


CALL = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'


@pytest.mark.parametrize("is_special", [True, False])
@pytest.mark.parametrize("closer", ["</think>\n\n", "", "\n", "</thi"])
def test_calls_follow_thoughts_and_end_those_that_are_not_closed(
    is_special: bool, closer: str
) -> None:
    markers = ("<think>", "</think>", "<tool_call>", "</tool_call>")
    tokenizer = vocabulary(*markers) if is_special else vocabulary(plain=markers)
    tokens = tokens_of(tokenizer, f"<think>\nHm.{closer}{CALL}")
    thought = "Hm." + (closer if closer == "</thi" else "")
    assert summed(read(calls_parser(is_special=is_special), tokens)) == (thought, "", ["now"])


@pytest.mark.parametrize(
    ("source", "name"),
    [
        (QWEN3.source, "think"),
        ("[SYSTEM_PROMPT][THINK][/THINK]", "mistral"),
        ("<|START_THINKING|><|END_THINKING|>", "cohere"),
        ("{{ messages }}", None),
    ],
)
def test_the_template_tells_the_form(source: str, name: str | None) -> None:
    found = find_reasoning(Described(source), vocabulary())
    assert (found.form.name if found else None) == name


def test_a_form_can_be_chosen_by_name() -> None:
    chosen = find_reasoning(Described("{{ messages }}"), vocabulary(), "deepseek_r1")
    assert chosen is not None
    assert chosen.form.is_implied
    assert find_reasoning(QWEN3, vocabulary(), "none") is None
    with pytest.raises(ValueError, match=r"--reasoning-parser must be one of none, .* Given: no"):
        find_reasoning(QWEN3, vocabulary(), "no")


@pytest.mark.parametrize(
    ("prompt", "begun"),
    [
        ("<|im_start|>assistant\n", Begun.NOTHING),
        ("<|im_start|>assistant\n<think>\n", Begun.OPEN),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", Begun.CLOSED),
        ("a <think>b</think> c", Begun.NOTHING),
    ],
)
def test_the_end_of_a_prompt_tells_what_is_begun(prompt: str, begun: Begun) -> None:
    assert ReasoningFormat(THINK).begun(prompt) is begun
    assert ReasoningFormat(BY_NAME["deepseek_r1"]).begun("Hi\n") is Begun.OPEN


@pytest.mark.parametrize(
    ("said", "begun"),
    [
        ("", Begun.NOTHING),
        ("So", Begun.CLOSED),
        ("<think>a", Begun.OPEN),
        ("<think>a</think>", Begun.CLOSED),
    ],
)
def test_a_begun_answer_tells_what_goes_on(said: str, begun: Begun) -> None:
    assert ReasoningFormat(THINK).begun_by(said) is begun


SCHEMA = Grammar(GrammarKind.JSON_SCHEMA, '{"type": "array", "items": {"type": "integer"}}')
REGEX = Grammar(GrammarKind.REGEX, r"\[(1/2|1,? ?2)?\]")
LARK = Grammar(GrammarKind.LARK, 'start: "[" pair? "]"\npair: "1, 2"\n')


def holds(
    said: str,
    *,
    response: Grammar | None,
    begun: Begun = Begun.NOTHING,
    choice: ToolChoice | None = None,
    has_tokens: bool = True,
) -> bool:
    """Whether the answer's grammar takes this text."""
    markers = ("<think>", "</think>", "<tool_call>", "</tool_call>")
    tokenizer = vocabulary(plain=markers) if has_tokens else vocabulary()
    reasoning = find_reasoning(QWEN3, tokenizer)
    calls = allowed_calls(TOOLS, choice, is_parallel=True) if choice else None
    grammar = answer_grammar(
        find_format(QWEN3, tokenizer), calls, response, Thoughts.behind(reasoning, begun)
    )
    assert grammar is not None
    assert grammar.kind is GrammarKind.LARK
    made = LLMatcher(
        LLTokenizer(tokenizer.to_str(), eos_token=EOS),
        LLMatcher.grammar_from_lark(grammar.source),
        log_level=0,
    )
    assert not made.is_error(), made.get_error()
    return accepts(made, tokenizer, said)


@pytest.mark.parametrize("has_tokens", [True, False])
@pytest.mark.parametrize("response", [SCHEMA, REGEX, LARK])
@pytest.mark.parametrize(
    ("said", "begun", "is_held"),
    [
        ("<think>\nIt { may [ be.\n</think>\n\n[1, 2]", Begun.NOTHING, True),
        ("<think></think>[]", Begun.NOTHING, True),
        ("[1, 2]", Begun.NOTHING, True),
        ("It may be.</think>[1, 2]", Begun.OPEN, True),
        ("[1, 2]</think>[1, 2]", Begun.OPEN, True),
        ("It may be.", Begun.OPEN, False),
        ("<think>Hm.</think>1, 2", Begun.NOTHING, False),
        ("Hm. [1, 2]", Begun.NOTHING, False),
    ],
)
def test_a_response_keeps_its_form_behind_thoughts(
    said: str, begun: Begun, is_held: bool, response: Grammar, has_tokens: bool
) -> None:
    assert holds(said, response=response, begun=begun, has_tokens=has_tokens) is is_held


def test_a_response_without_thoughts_keeps_its_own_grammar() -> None:
    tokenizer = vocabulary()
    reasoning = find_reasoning(QWEN3, tokenizer)
    closed = Thoughts.behind(reasoning, Begun.CLOSED)
    assert answer_grammar(find_format(QWEN3, tokenizer), None, SCHEMA, closed) is SCHEMA
    assert answer_grammar(find_format(QWEN3, tokenizer), None, None, closed) is None


@pytest.mark.parametrize("has_tokens", [True, False])
@pytest.mark.parametrize(
    ("said", "choice", "is_held"),
    [
        (f"<think>Hm.</think>\n\n{CALL}", REQUIRED, True),
        (CALL, REQUIRED, True),
        ("<think>Hm.</think>\n\nNo call.", REQUIRED, False),
        (f"<think>Hm.</think>\n\n{CALL}", AUTO, True),
        ("<think>Hm.</think>\n\nNo call.", AUTO, True),
    ],
)
def test_calls_stand_behind_thoughts(
    said: str, choice: ToolChoice, is_held: bool, has_tokens: bool
) -> None:
    assert holds(said, response=None, choice=choice, has_tokens=has_tokens) is is_held


@pytest.mark.parametrize("has_tokens", [True, False])
@pytest.mark.parametrize(
    ("said", "choice", "is_held"),
    [
        (CALL, AUTO, True),
        ("[1, 2]", AUTO, True),
        (f"<think>Hm.</think>{CALL}", AUTO, True),
        ("<think>Hm.</think>[1, 2]", AUTO, True),
        ("Some text.", AUTO, False),
        (f"[1, 2]{CALL}", AUTO, False),
        ("[1, 2]", REQUIRED, False),
        (CALL, REQUIRED, True),
    ],
)
def test_with_tools_and_a_response_form_an_answer_is_one_of_both(
    said: str, choice: ToolChoice, is_held: bool, has_tokens: bool
) -> None:
    assert holds(said, response=SCHEMA, choice=choice, has_tokens=has_tokens) is is_held
