import json
import re
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from llguidance import LLMatcher, LLTokenizer
from tests.fakes.byte_tokenizer import EOS
from tests.fakes.tool_models import (
    BARE,
    MODELS,
    PLAIN,
    QWEN,
    SPECIAL,
    Described,
    format_of,
    vocabulary,
)

from kagami_proto.values import GrammarKind
from kagami_router.tools import reasoning
from kagami_router.tools.answer_grammar import answer_grammar
from kagami_router.tools.call_arguments import JSON
from kagami_router.tools.formats import ToolFormat, find_format
from kagami_router.tools.offers import (
    AUTO,
    REQUIRED,
    AllowedCalls,
    allowed_calls,
    read_choice,
    read_tools,
)
from kagami_router.tools.tool_forms import FORMS

TOOLS = read_tools(
    [
        {
            "type": "function",
            "function": {
                "name": "weather",
                "parameters": {
                    "type": "object",
                    "properties": {"city": {"$ref": "#/$defs/City"}, "days": {"type": "integer"}},
                    "required": ["city"],
                    "$defs": {"City": {"type": "string"}},
                },
            },
        },
        {"type": "function", "function": {"name": "now"}},
        {
            "type": "function",
            "function": {
                "name": "paint",
                "parameters": {
                    "type": "object",
                    "properties": {"city": {"$ref": "#/$defs/City"}},
                    "required": ["city"],
                    "$defs": {"City": {"enum": ["red", "blue"]}},
                },
            },
        },
    ]
)
WEATHER = '{"city": "Rome", "days": 3}'


def said(model: str, *calls: tuple[str, str]) -> str:
    """The text of calls in this model's form."""
    form = format_of(model).form
    texts = []
    for number, (name, arguments) in enumerate(calls):
        written = arguments if form.style is JSON else form.style.written(json.loads(arguments))
        texts.append(form.call(name, written, number))
    return form.calls(texts)


def lark(tool_format: ToolFormat, calls: AllowedCalls) -> str:
    grammar = answer_grammar(tool_format, calls)
    assert grammar is not None
    assert grammar.kind is GrammarKind.LARK
    return grammar.source


def matcher(model: str, choice: Any = None, *, is_parallel: bool = True) -> LLMatcher:
    calls = allowed_calls(TOOLS, read_choice(choice), is_parallel=is_parallel)
    assert calls is not None
    source = LLMatcher.grammar_from_lark(lark(format_of(model), calls))
    vocabulary = LLTokenizer(MODELS[model][1].to_str(), eos_token=EOS)
    made = LLMatcher(vocabulary, source, log_level=0)
    assert not made.is_error(), made.get_error()
    return made


def accepts(made: LLMatcher, tokenizer: tokenizers.Tokenizer, text: str) -> bool:
    """Whether the grammar allows `text`, and allows the answer to end after it."""
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    return made.try_consume_tokens(ids) == len(ids) and made.is_accepting()


def takes(model: str, text: str, choice: Any = None, *, is_parallel: bool = True) -> bool:
    made = matcher(model, choice, is_parallel=is_parallel)
    return accepts(made, MODELS[model][1], text)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("choice", [None, "required", "weather"])
def test_a_valid_call_is_accepted(model: str, choice: str | None) -> None:
    assert takes(model, said(model, ("weather", WEATHER)), choice)


INVALID = (
    ("weather", '{"days": 3}'),
    ("weather", '{"city": "Rome", "more": 1}'),
    ("unknown", "{}"),
    ("now", '{"city": "Rome"}'),
    ("paint", '{"city": "Rome"}'),
)
# Tags have neither quotes nor white space of JSON's: there "3" is a string.
INVALID_JSON = (("weather", '{"city": 3}'), ("weather", '{   "city": "Rome"}'), ("weather", "[]"))
INVALID_CALLS = [
    (model, *call)
    for model in MODELS
    for call in (INVALID + INVALID_JSON if format_of(model).form.style is JSON else INVALID)
]


@pytest.mark.parametrize(("model", "name", "arguments"), INVALID_CALLS)
@pytest.mark.parametrize("choice", ["auto", "required"])
def test_an_invalid_call_is_refused(model: str, name: str, arguments: str, choice: str) -> None:
    assert not takes(model, said(model, (name, arguments)), choice)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    "text", ["Hello!", "", "a < b and {c}", "{}", '{"name', "[1, 2]", "<tool", "two\nlines"]
)
def test_auto_allows_text_and_required_does_not(model: str, text: str) -> None:
    assert takes(model, text, "auto")
    assert not takes(model, text, "required")


@pytest.mark.parametrize("model", [one for one in MODELS if one not in BARE])
def test_auto_allows_text_before_a_call(model: str) -> None:
    assert takes(model, "I will look. " + said(model, ("now", "{}")))


@pytest.mark.parametrize("model", MODELS)
def test_nothing_but_calls_follows_a_call(model: str) -> None:
    assert not takes(model, said(model, ("now", "{}")) + " So.")


@pytest.mark.parametrize("model", [one for one in MODELS if format_of(one).form.between])
def test_several_calls_unless_they_are_not_wanted(model: str) -> None:
    text = said(model, ("now", "{}"), ("weather", WEATHER))
    assert takes(model, text)
    assert takes(model, text, "required")
    assert not takes(model, text, is_parallel=False)
    assert not takes(model, text, "required", is_parallel=False)


@pytest.mark.parametrize("model", MODELS)
def test_a_named_tool_is_the_only_one(model: str) -> None:
    assert takes(model, said(model, ("now", "{}")), "now")
    assert not takes(model, said(model, ("paint", '{"city": "red"}')), "now")


def test_llama_may_put_its_tag_before_a_call() -> None:
    call = said("llama", ("weather", WEATHER))
    assert takes("llama", "<|python_tag|>" + call)
    assert takes("llama", "<|python_tag|>" + call, "required")


def test_an_unfinished_call_is_no_answer() -> None:
    assert not takes("qwen", said("qwen", ("now", "{}"))[:-3])


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("unaware", "hermes"),
        ("qwen", "hermes"),
        ("llama", "llama"),
        ("mistral", "mistral"),
        ("mistral-args", "mistral_args"),
        *((one, one) for one in SPECIAL),
        *((f"{one}-added", one) for one in PLAIN),
    ],
)
def test_the_form_follows_the_template(model: str, name: str) -> None:
    assert format_of(model).form.name == name


def test_a_form_that_no_template_shows_is_explained_in_the_prompt() -> None:
    assert not find_format(Described("{{ tools }}"), vocabulary()).is_known
    assert not format_of("unaware").is_known
    assert format_of("qwen").is_known
    shown = find_format(Described("<tool_call><function=…>", reads_tools=False), vocabulary())
    assert shown.form.name == "qwen3_coder"
    assert not shown.is_known


def test_a_form_can_be_chosen_by_name() -> None:
    assert find_format(QWEN, vocabulary(), "pythonic").form.name == "pythonic"
    assert find_format(QWEN, vocabulary(), "llama3_json").form.name == "llama"
    with pytest.raises(ValueError, match=r"--tool-call-parser must be one of hermes, .* Given: no"):
        find_format(QWEN, vocabulary(), "no")


def test_only_tokens_without_text_are_special_markers() -> None:
    assert not format_of("qwen").special_markers
    assert format_of("mistral").special_markers == {"[TOOL_CALLS]"}


@pytest.mark.parametrize("is_strict", [True, False])
def test_what_cannot_be_held_is_an_error_of_strict_tools_alone(is_strict: bool) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "string", "format": "color"}}}
    function = {"name": "f", "parameters": schema, "strict": is_strict}
    calls = allowed_calls(read_tools([{"function": function}]), REQUIRED, is_parallel=True)
    assert calls is not None
    source = LLMatcher.grammar_from_lark(lark(format_of("qwen"), calls))
    assert bool(LLMatcher.validate_grammar(source)) is is_strict


def test_a_hundred_tools_compile() -> None:
    many = read_tools([{"function": {"name": f"f{n}", "parameters": {}}} for n in range(100)])
    calls = allowed_calls(many, AUTO, is_parallel=True)
    assert calls is not None
    source = lark(format_of("qwen"), calls)
    assert LLMatcher.validate_grammar(LLMatcher.grammar_from_lark(source)) == ""


def test_no_name_means_two_forms() -> None:
    names = [name for form in FORMS for name in (form.name, *form.other_names)]
    assert len(names) == len(set(names))


def test_the_page_lists_every_form_and_no_other() -> None:
    page = (Path(__file__).parents[3] / "docs" / "tools.md").read_text()
    tables = [part for part in page.split("\n## ") if part.startswith("Forms of")]
    listed = [re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) for table in tables]
    assert [sorted(names) for names in listed] == [
        sorted(form.name for form in FORMS),
        sorted(form.name for form in reasoning.FORMS),
    ]
