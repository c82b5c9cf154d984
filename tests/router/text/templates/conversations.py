"""Chats as clients send them: a list of messages and the other fields of the request."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

_NONE: Mapping[str, Any] = MappingProxyType({})


class Chat(NamedTuple):
    messages: list[dict[str, Any]]
    options: Mapping[str, Any] = _NONE  # `PromptOptions`; `variables` are chat_template_kwargs


def user(content: Any = "Hi") -> dict[str, Any]:
    return {"role": "user", "content": content}


def system(content: Any = "Be brief.") -> dict[str, Any]:
    return {"role": "system", "content": content}


def assistant(content: Any = "Hello!", **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


def text(*parts: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": part} for part in parts]


WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather <now> & here's 天気",
        "parameters": {
            "type": "object",
            "properties": {
                "place": {"type": "string", "description": "a town"},
                "unit": {"type": "string", "enum": ["C", "F"], "default": "C"},
                "days": {"type": "array", "items": {"type": "integer"}},
                "at": {"oneOf": [{"type": "number"}, {"type": ["string", "null"]}]},
                "where": {"type": "object", "properties": {"x": {"type": "number"}}},
            },
            "required": ["place"],
        },
    },
}
NOW = {"type": "function", "function": {"name": "now", "description": "", "parameters": {}}}
CALL = {
    "id": "abcdef123",
    "type": "function",
    "function": {"name": "get_weather", "arguments": {"place": "Köln", "unit": "C"}},
}
RESULT = {"role": "tool", "content": "8 °C", "tool_call_id": "abcdef123", "name": "get_weather"}
CALLED = [user("Weather?"), assistant("", tool_calls=[CALL]), RESULT]
SECOND = {**RESULT, "content": "9 °C"}
TOOLS = {"tools": [WEATHER, NOW]}
CONTINUE = {"continue_final_message": True}

CHATS: dict[str, Chat] = {
    "one message": Chat([user()]),
    "system": Chat([system(), user()]),
    "turns": Chat([user(), assistant(), user("And?\n"), assistant(" Well. "), user("Bye")]),
    "system and turns": Chat([system(), user(), assistant(), user("More")]),
    "japanese": Chat(
        [
            system("簡潔に。"),
            user("鏡は？ 🪞\r\n<b>&amp;'\"</b>"),
            assistant("鏡です"),
            user("か\u3000"),
        ]
    ),
    "empty": Chat([system(""), user(""), assistant(""), user("")]),
    "white space": Chat([system("  a\n"), user("\n\n b "), assistant("\tc "), user(" ")]),
    "two users": Chat([user("a"), user("b")]),
    "late system": Chat([user(), system()]),
    "unknown role": Chat([{"role": "critic", "content": "Hm"}]),
    "developer": Chat([{"role": "developer", "content": "Rules"}, user()]),
    "a name": Chat([{**user(), "name": "Ann"}]),
    "nulls": Chat([{**user(), "name": None, "tool_calls": None}]),
    "chunks": Chat([system(text("Be ", "brief.")), user(text("Hi", " there"))]),
    "one chunk": Chat([user(text("Hi")), assistant(text("Ho")), user("So")]),
    "thoughts": Chat([user(), assistant("<think>\nhm\n</think>\n\nYes"), user("Why?")]),
    "reasoning": Chat([user(), assistant("Yes", reasoning_content="hm"), user("Why?")]),
    "reasoning, older name": Chat(
        [*CALLED[:1], assistant("", reasoning="hm", tool_calls=[CALL]), RESULT], TOOLS
    ),
    "tools": Chat([user("Weather?")], TOOLS),
    "system and tools": Chat([system(), user(), assistant(), user("Weather?")], TOOLS),
    "no tools": Chat([user()], {"tools": []}),
    "called": Chat(CALLED, TOOLS),
    "called without tools": Chat(CALLED),
    "called with text": Chat([user(), assistant("Let me see.", tool_calls=[CALL]), RESULT], TOOLS),
    "called twice": Chat([user(), assistant("", tool_calls=[CALL, CALL]), RESULT, SECOND], TOOLS),
    "answered": Chat([*CALLED, assistant("It is 8 °C."), user("Thanks")], TOOLS),
    "short ids": Chat([user(), assistant("", tool_calls=[{**CALL, "id": "1"}]), RESULT], TOOLS),
    "a result alone": Chat([user(), RESULT]),
    "no prompt": Chat([user(), assistant()], {"add_generation_prompt": False}),
    "a new message": Chat([user(), assistant()], {"add_generation_prompt": True}),
    "continue": Chat([user(), assistant("The answer is")], CONTINUE),
    "continue, space": Chat([system(), user(), assistant(" The answer is ")], CONTINUE),
    "continue, markup": Chat([user("assistant"), assistant("assistant")], CONTINUE),
    "continue, thoughts": Chat([user(), assistant("<think>\nhm\n</think>\n\nSo")], CONTINUE),
    "continue, open thought": Chat([user(), assistant("<think>\nhm")], CONTINUE),
    "continue chunks": Chat([user(text("a")), assistant(text("The", " answer "))], CONTINUE),
    "continue a user": Chat([user("The question")], CONTINUE),
    "continue reasoning": Chat(
        [user(), assistant("Yes", reasoning_content="hm")],
        {"continue_final_message": "reasoning_content"},
    ),
    "not thinking": Chat([user()], {"variables": {"enable_thinking": False}}),
    "thinking": Chat([user()], {"variables": {"enable_thinking": True, "thinking": True}}),
    "a date": Chat([system(), user()], {"variables": {"date_string": "1 Jan 2027"}}),
    "a token of one's own": Chat([user()], {"variables": {"bos_token": "!", "eos_token": "?"}}),
    "controls": Chat(
        [user()],
        {
            "variables": {
                "controls": {"length": "long", "citations": True},
                "reasoning_effort": "low",
            }
        },
    ),
    "builtin tools": Chat(
        [user(), assistant("", tool_calls=[CALL]), RESULT],
        {**TOOLS, "variables": {"builtin_tools": ["get_weather"], "tools_in_user_message": False}},
    ),
    "documents": Chat(
        [user("Which?")],
        {"documents": [{"title": "A", "text": "α"}, {"title": "B", "text": "β"}]},
    ),
    "rag": Chat(
        [user("Which?")],
        {"template": "rag", "documents": [{"title": "A", "text": "α"}]},
    ),
}
