"""Answers read by a response template: as transformers reads them, whole and at every cut."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

import pytest
from tests.fakes.tool_models import LLAMA, QWEN, UNAWARE, Described, vocabulary
from tests.router.tools.test_formats import TOOLS

from kagami_router.request.values import Token
from kagami_router.tools.answer_form import MarkedForm, Opening, TemplateForm, Wanted, find_form
from kagami_router.tools.deltas import CallArguments, CallStart, Delta, ReasoningDelta, TextDelta
from kagami_router.tools.formats import find_format
from kagami_router.tools.offers import AUTO, REQUIRED, AllowedCalls, allowed_calls
from kagami_router.tools.reasoning import find_reasoning
from kagami_router.tools.response_template import read_template
from kagami_router.tools.template_parser import TemplateParser

chat_parsing = pytest.importorskip("transformers.utils.chat_parsing")

FUNCTION = {"type": "function", "function": "{content}"}
NAMED = {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}}
THOUGHTS = {"open": "<think>", "close": "</think>", "content": "text"}
JSON_CALLS: Mapping[str, Any] = {
    "start_anchor": "<|im_start|>assistant\n",
    "defaults": {"role": "assistant"},
    "fields": {
        "reasoning_content": THOUGHTS,
        "tool_calls": {
            "open_pattern": r"\s*<tool_call>",
            "close": "</tool_call>",
            "repeats": True,
            "content": "json",
            "transform": FUNCTION,
        },
        "content": {"close_pattern": r"\s*(?:<\|im_end\|>|<\|endoftext\|>)", "content": "text"},
    },
}
TAGGED_CALLS: Mapping[str, Any] = {
    "start_anchor": "<|im_start|>assistant\n",
    "fields": {
        "thinking": THOUGHTS,
        "tool_calls": {
            "open_pattern": r"\s*<tool_call>\s*<function=(?P<name>[^>\n]+)>",
            "close_pattern": r"</function>\s*</tool_call>",
            "repeats": True,
            "content": "xml-inline",
            "content_args": {
                "tag_pattern": r"<parameter=(?P<key>[^>\n]+)>\s*(?P<value>.*?)\s*</parameter>"
            },
            "transform": NAMED,
        },
        "content": {},
    },
}
BRACE_CALLS: Mapping[str, Any] = {
    "start_anchor": ["<turn>model\n", "<result>"],
    "fields": {
        "reasoning": {"open": "<channel>thought\n", "close": "<channel|>"},
        "tool_calls": {
            "open_pattern": r"<call>call:(?P<name>\w+)",
            "close": "<call|>",
            "repeats": True,
            "content": "json",
            "content_args": {"unquoted_keys": True, "string_delims": [["<q>", "<q>"]]},
            "transform": NAMED,
        },
        "content": {"close": ["<turn|>", "<turn|>\n"]},
    },
}
PYTHON_CALLS: Mapping[str, Any] = {
    "start_anchor_pattern": r"<\|assistant\|>",
    "fields": {
        "tool_calls": {
            "open": "<calls>",
            "close": "</calls>",
            "content": "python-call-list",
            "transform": {
                "type": "function",
                "function": {"name": "{name}", "arguments": "{arguments}"},
            },
            "transform_each": True,
        },
        "content": {},
    },
}
LINE_CALLS: Mapping[str, Any] = {
    "start_anchor": "<a>",
    "fields": {
        "tool_calls": {
            "open_pattern": r"CALL (?P<name>\w+)\n",
            "close": "END",
            "repeats": True,
            "content": "kv-lines",
            "transform": NAMED,
        },
        "content": {},
    },
}
# template, prompt, answer
RECORDED = [
    (JSON_CALLS, "<|im_start|>assistant\n", "<think>\nHm.\n</think>\n\nHello  there.<|im_end|>"),
    (JSON_CALLS, "<|im_start|>assistant\n<think>\n", "Hm.\n</think>\n\nHello<|im_end|>"),
    (
        JSON_CALLS,
        "<|im_start|>assistant\n<think>\n\n</think>\n\n",
        "Hello <|im_end|>\n<|endoftext|>",
    ),
    (
        JSON_CALLS,
        "<|im_start|>assistant\n",
        'I look.\n<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>\n<tool_call>\n'
        '{"name": "weather", "arguments": {"city": "Rome", "days": 3}}\n</tool_call><|im_end|>',
    ),
    (
        TAGGED_CALLS,
        "<|im_start|>assistant\n<think>\n",
        "Hm</think>\n\n<tool_call>\n<function=weather>\n<parameter=city>\nRome\n</parameter>\n"
        "<parameter=days>\n3\n</parameter>\n</function>\n</tool_call>",
    ),
    (TAGGED_CALLS, "", "<thi <tool_call>\n<function"),
    (
        BRACE_CALLS,
        "<turn>model\n",
        "<channel>thought\nHm.<channel|><call>call:weather{city:<q>Ro{me<q>,days:3}<call|>",
    ),
    (BRACE_CALLS, "<turn>model\n", "Hello<turn|>\n"),
    (
        PYTHON_CALLS,
        "<|assistant|>",
        "Let me see. <calls>[weather(city='Ro\\'me', days=2), now()]</calls>",
    ),
    (LINE_CALLS, "<a>", "CALL weather\ncity: Rome\ndays: 4\nEND"),
]


def calls(*, is_required: bool = False) -> AllowedCalls:
    found = allowed_calls(TOOLS, REQUIRED if is_required else AUTO, is_parallel=True)
    assert found is not None
    return found


def read(parser: TemplateParser, pieces: Iterable[str]) -> dict[str, Any]:
    """The answer as a message."""
    deltas: list[Delta] = []
    for piece in pieces:
        deltas += parser.push_text(piece)
    deltas += parser.finish(is_cut=False)
    called: list[dict[str, Any]] = []
    for delta in deltas:
        match delta:
            case CallStart(_, _, name):
                called.append({"name": name, "arguments": ""})
            case CallArguments(index, text):
                called[index]["arguments"] += text
            case _:
                pass
    for call in called:
        call["arguments"] = json.loads(call["arguments"])
    return {
        "thoughts": "".join(one.text for one in deltas if isinstance(one, ReasoningDelta)),
        "text": "".join(one.text for one in deltas if isinstance(one, TextDelta)),
        "calls": called,
    }


def judged(template: Mapping[str, Any], prompt: str, said: str) -> dict[str, Any]:
    """The same as transformers reads it."""
    definitions = [tool.definition for tool in TOOLS]
    message = chat_parsing.parse_response(said, dict(template), prefix=prompt, tools=definitions)
    names = ("reasoning_content", "reasoning", "thinking")
    return {
        "thoughts": next((message[name] for name in names if name in message), ""),
        "text": message.get("content", ""),
        "calls": [one["function"] for one in message.get("tool_calls", [])],
    }


@pytest.mark.parametrize(("template", "prompt", "said"), RECORDED)
def test_answers_are_read_as_transformers_reads_them_at_every_cut(
    template: Mapping[str, Any], prompt: str, said: str
) -> None:
    expected = judged(template, prompt, said)
    spec = read_template(template)
    cuts = [[said], list(said), *([said[:at], said[at:]] for at in range(1, len(said)))]
    for pieces in cuts:
        assert read(TemplateParser(spec, prompt, calls()), pieces) == expected


@pytest.mark.parametrize(
    "said",
    [
        '<tool_call>\n{"name": "unknown", "arguments": {}}\n</tool_call>',
        '<tool_call>\n{"name": "now", "arguments": {bad}}\n</tool_call>',
        '<tool_call>\n{"name": "now", "arguments": 3}\n</tool_call>',
        '<tool_call>\n["now"]\n</tool_call>',
    ],
)
def test_what_is_no_call_that_may_be_made_is_text(said: str) -> None:
    answer = read(TemplateParser(read_template(JSON_CALLS), "", calls()), [said])
    assert answer == {"thoughts": "", "text": said, "calls": []}


def test_a_call_that_was_made_before_ends_the_answer() -> None:
    one = '<tool_call>{"name": "now", "arguments": {}}</tool_call>'
    parser = TemplateParser(read_template(JSON_CALLS), "", calls())
    assert read(parser, [one, one, "text"])["calls"] == [{"name": "now", "arguments": {}}]
    assert parser.is_over


def test_text_and_thoughts_go_out_at_once() -> None:
    parser = TemplateParser(read_template(JSON_CALLS), "", calls())
    assert parser.push_text("<think>\nFirst ") == [ReasoningDelta("First")]
    assert parser.push_text("second</think>Hi <") == [ReasoningDelta(" second"), TextDelta("Hi")]
    assert parser.push_text("b>") == [TextDelta(" <b>")]


def test_special_tokens_that_no_delimiter_has_are_no_text() -> None:
    parser = TemplateParser(read_template(JSON_CALLS), "", calls())
    special = [
        Token(1, text, -0.5, True) for text in ("<think>", "<pad>", "</think>", "<|im_end|>")
    ]
    deltas = [delta for token in special for delta in parser.push(token, "a")]
    assert "".join(one.text for one in deltas if isinstance(one, ReasoningDelta)) == "aa"
    assert "".join(one.text for one in deltas if isinstance(one, TextDelta)) == "aa"
    assert parser.num_reasoning_tokens == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "version must be 1. Given: 2"),
        ({"start_anchor": None}, "start_anchor is missing"),
        ({"start_anchor": ""}, "start_anchor must be a text or a list"),
        ({"fields": {}}, "fields must be an object with members"),
        ({"more": 1}, "members that are not known: more"),
        ({"fields": {"a": {"content": "yaml"}}}, "fields.a.content must be one of text, .*yaml"),
        ({"fields": {"a": {"open_pattern": "("}}}, "fields.a.open_pattern: "),
        ({"fields": {"a": {"open": "x", "open_pattern": "y"}}}, "exclude each other"),
        ({"fields": {"a": {}, "b": {}}}, "more than one field has no `open`"),
        ({"fields": {"a": {"transform": "x{content}"}}}, "stands alone"),
    ],
)
def test_a_template_that_cannot_be_read_says_why(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_template({**JSON_CALLS, **changes})


def marked(template: Described) -> MarkedForm:
    tokenizer = vocabulary()
    return MarkedForm(find_format(template, tokenizer), find_reasoning(template, tokenizer))


QWEN3 = Described(f"{QWEN.source}<think></think>")


@pytest.mark.parametrize(
    ("spec", "built_in", "is_own"),
    [
        (JSON_CALLS, QWEN3, False),  # both read a sample in the same way
        (JSON_CALLS, QWEN, True),  # thoughts are known to the template alone
        (JSON_CALLS, LLAMA, True),
        (TAGGED_CALLS, QWEN3, True),
        (PYTHON_CALLS, UNAWARE, True),
    ],
)
def test_a_built_in_form_that_reads_the_same_is_preferred(
    spec: Mapping[str, Any], built_in: Described, is_own: bool
) -> None:
    form = find_form(read_template(spec), marked(built_in), reads_tools=True)
    assert isinstance(form, TemplateForm) is is_own


def test_calls_that_have_to_be_made_are_held_and_read_in_the_built_in_form() -> None:
    form = TemplateForm(read_template(PYTHON_CALLS), marked(UNAWARE), reads_tools=True)
    wanted = Wanted(calls(is_required=True), None, has_grammars=True)
    reading = form.reading(Opening(""), wanted)
    assert reading.grammar is not None
    assert not form.shows_tools(calls(is_required=True))
    assert form.shows_tools(calls())
    free = form.reading(Opening(""), Wanted(calls(), None, has_grammars=True))
    assert free.grammar is None
    assert isinstance(free.new_parser(), TemplateParser)
