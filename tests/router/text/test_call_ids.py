"""Ids of calls, with templates that take one form of them, and with those that take all."""

import re
import time
from pathlib import Path
from typing import Any

import pytest
from tests.fakes.fake_server import TOKENS

from kagami_router.text import chat_template, tokenizer
from kagami_router.text.call_ids import IdForm, with_ids
from kagami_router.text.chat_template import ChatTemplate
from kagami_router.text.templates.values import Arguments

NEMO = Path(__file__).parent / "templates" / "families" / "mistral_nemo"
# As the templates of Mistral's newer tokenizers write calls: the id stands between two markers.
WITH_CALL_ID = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST]{{ m.content }}[/INST]"
    "{% elif m.tool_calls %}{% for c in m.tool_calls %}"
    "{% if c.id is not defined or c.id is not string or c.id | length != 9 %}"
    "{{ raise_exception('ids have nine characters') }}{% endif %}"
    "[TOOL_CALLS]{{ c.function.name }}[CALL_ID]{{ c.id }}[ARGS]{{ c.function.arguments | tojson }}"
    "{% endfor %}{% elif m.role == 'tool' %}"
    "{% if m.tool_call_id is not defined or m.tool_call_id | length != 9 %}"
    "{{ raise_exception('ids have nine characters') }}{% endif %}"
    "[TOOL_RESULTS]{{ m.tool_call_id }}[TOOL_CONTENT]{{ m.content }}[/TOOL_RESULTS]"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}"
)
# As Kimi's: the function's name is a part of the id.
KIMI = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.tool_calls %}{% for c in m.tool_calls %}"
    "<|call|>{{ c['id'] }}<|args|>{{ c.function.arguments | tojson }}<|end|>{% endfor %}"
    "{% elif m.role == 'tool' %}## Return of {{ m.tool_call_id }}\n{{ m.content }}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}"
)
PLAIN = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.tool_calls %}{% for c in m.tool_calls %}"
    "{{ c.id }}:{{ c.function.name }};{% endfor %}"
    "{% elif m.role == 'tool' %}{{ m.tool_call_id }}={{ m.content }}"
    "{% else %}{{ m.content }}{% endif %}{% endfor %}"
)
Turn = tuple[tuple[Any, ...], tuple[Any, ...]]  # ids of calls, ids of results


def conversation(*turns: Turn) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = [{"role": "user", "content": "Weather?"}]
    for calls, results in turns:
        made = [call(given, f"f{at}") for at, given in enumerate(calls)]
        messages.append({"role": "assistant", "content": None, "tool_calls": made})
        messages += [
            {"role": "tool", "content": f"r{at}", "tool_call_id": given}
            for at, given in enumerate(results)
        ]
    return messages


def call(given: object, name: str) -> dict[str, Any]:
    function = {"name": name, "arguments": Arguments("{}", {})}
    return {"id": given, "type": "function", "function": function}


def nine(*turns: Turn) -> list[tuple[list[str], list[str]]]:
    """The ids of each turn as a template that takes nine characters gets them."""
    read: list[tuple[list[str], list[str]]] = []
    for message in with_ids(conversation(*turns), IdForm.NINE):
        if calls := message.get("tool_calls"):
            read.append(([one["id"] for one in calls], []))
        elif message["role"] == "tool":
            read[-1][1].append(message["tool_call_id"])
    return read


def mistral(name: str) -> ChatTemplate:
    if name == "call_id":
        return ChatTemplate(WITH_CALL_ID, TOKENS)
    loaded = chat_template.load(NEMO, tokenizer.special_tokens(NEMO))
    assert isinstance(loaded, ChatTemplate)
    return loaded


FOREIGN = [
    "call_1",
    "toolu_01A09q90qw90lq917835lq9",
    "call_" + "x" * 40,
    "chatcmpl-tool-0123456789abcdef",
    "functions.f0:0",
    "0",
    "",
    "天気",
    "nine-char",
    None,
    7,
]


@pytest.mark.parametrize("name", ["nemo", "call_id"])
@pytest.mark.parametrize("given", FOREIGN)
async def test_a_foreign_id_is_nine_letters_and_digits_in_the_prompt(
    name: str, given: object
) -> None:
    prompt = await mistral(name).prompt(conversation(((given,), (given,))))
    (found,) = set(re.findall(r'(?:id": "|CALL_ID\]|RESULTS\])([A-Za-z0-9]{9})\b', prompt))
    assert prompt.count(found) == 2


@pytest.mark.parametrize("given", FOREIGN)
def test_a_call_and_its_result_have_one_id(given: object) -> None:
    (([new], [same]),) = nine(((given,), (given,)))
    assert new == same
    assert re.fullmatch("[A-Za-z0-9]{9}", new)


def test_an_id_that_has_the_form_stays() -> None:
    assert nine((("abcDEF123",), ("abcDEF123",))) == [(["abcDEF123"], ["abcDEF123"])]


@pytest.mark.parametrize("given", ["0", "", None, "abcdefghi"])
def test_calls_with_the_same_id_are_told_apart(given: object) -> None:
    turns = nine(((given, given), (given, given)), ((given,), (given,)))
    ids = [one for calls, _ in turns for one in calls]
    assert len(set(ids)) == 3
    assert [results for _, results in turns] == [calls for calls, _ in turns]


def test_results_in_another_order_find_their_calls() -> None:
    ((calls, results),) = nine((("a", "b", "c"), ("c", "a", "b")))
    assert results == [calls[2], calls[0], calls[1]]


def test_a_result_without_an_id_is_that_of_the_first_call_without_a_result() -> None:
    ((calls, results),) = nine((("a", "b", "a"), ("b", None, "")))
    assert results == [calls[1], calls[0], calls[2]]


def test_a_second_result_has_the_id_of_the_same_call() -> None:
    first, second = nine((("a", "b"), ("a", "a")), (("c",), ("b",)))
    assert first[1] == [first[0][0]] * 2
    assert second[1] == [first[0][1]]


def test_a_result_without_a_call_has_an_id_of_its_own() -> None:
    ((calls, results),) = nine((("a",), ("zz", "zz")))
    assert len({*calls, *results}) == 2


def test_what_comes_later_changes_no_earlier_id() -> None:
    turns: list[Turn] = [
        (("a", "a"), ("a", "a")),
        (("b",), ("a", "c")),
        (("", "0"), ("0", "")),
        (("a", "b", "c"), ("c",)),
    ]
    later = nine(*turns)
    made = {one for calls, _ in later for one in calls}
    for number in range(1, len(turns)):
        assert nine(*turns[:number]) == later[:number]
    # Not even an id that is just like one that was made.
    last = sorted(made)[0]
    assert nine(*turns, ((last,), (last,)))[:-1] == later
    assert nine(*turns, ((last,), (last,)))[-1][0][0] not in made


def test_the_messages_of_the_client_are_not_changed() -> None:
    messages, same = (conversation((("call_1",), ("call_1",))) for _ in range(2))
    with_ids(messages, IdForm.NINE)
    assert messages == same


@pytest.mark.parametrize("given", ["0", None, "abcdefghi"])
def test_thousands_of_calls_with_one_id_cost_little(given: object) -> None:
    begin = time.process_time()
    ((calls, results),) = nine(((given,) * 20_000, (given,) * 20_000))
    assert calls == results
    assert len(set(calls)) == 20_000
    assert time.process_time() - begin < 5


async def test_a_template_that_takes_any_id_gets_them_as_sent() -> None:
    prompt = await ChatTemplate(PLAIN, TOKENS).prompt(conversation((("call_1", "x"), ("x", "y"))))
    assert prompt == "<|user|>Weather?<|assistant|>call_1:f0;x:f1;<|tool|>x=r0<|tool|>y=r1"


async def test_a_template_that_shows_the_id_alone_gets_the_functions_name_in_it() -> None:
    template = ChatTemplate(KIMI, TOKENS)
    turns: list[Turn] = [(("a", "b"), ("b", "a")), (("a",), ("a",)), ((), ("zz",))]
    messages = conversation(*turns[:2])
    prompt = await template.prompt(messages)
    assert re.findall(r"functions\.f\d:\d", prompt) == [
        *("functions.f0:0", "functions.f1:1", "functions.f1:1", "functions.f0:0"),
        *("functions.f0:2", "functions.f0:2"),
    ]
    again = await template.prompt([*messages, {"role": "tool", "tool_call_id": "zz"}])
    assert again.startswith(prompt)
    assert "Return of zz" in again
