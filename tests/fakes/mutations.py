"""Valid bodies of every POST route, and what a broken or hostile client makes of them."""

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import Any

_TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
_SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
_TALK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hé 🗻"}]
_CALLED = [
    {"role": "user", "content": [{"type": "text", "text": "How warm is it?"}]},
    {"role": "assistant", "tool_calls": [{"id": "0", "type": "function", "function": {
        "name": "weather", "arguments": '{"city": "Paris"}'}}]},
    {"role": "tool", "tool_call_id": "0", "content": "6.7"},
]  # fmt: skip
_NATIVE = {
    "inputs": "Hé 🗻",
    "parameters": {
        "max_new_tokens": 2, "details": True, "decoder_input_details": False, "seed": 3,
        "temperature": 0.5, "top_p": 0.9, "top_k": 10, "typical_p": 0.9, "top_n_tokens": 2,
        "repetition_penalty": 1.2, "frequency_penalty": 0.1, "stop": ["x"], "truncate": 5,
        "do_sample": True, "watermark": True, "return_full_text": True, "best_of": 1,
    },
}  # fmt: skip
_CONSTRAINED = {
    "inputs": "a",
    "parameters": {"max_new_tokens": 4, "grammar": {"type": "regex", "value": "[0-9]{1,3}"}},
}
_CHAT = {
    "model": "tgi", "messages": _TALK, "max_tokens": 2, "temperature": 1.0, "top_p": 0.9, "n": 2,
    "seed": 3, "stop": ["x"], "logprobs": True, "top_logprobs": 2, "presence_penalty": 0.5,
    "frequency_penalty": 0.5, "logit_bias": {"5": -1}, "user": "me", "stream": False,
    "stream_options": {"include_usage": True},
}  # fmt: skip
_TOOLS = {"messages": _CALLED, "max_tokens": 3, "tools": [_TOOL], "tool_choice": "auto"}
_FORMAT = {
    "messages": _TALK,
    "max_completion_tokens": 3,
    "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": _SCHEMA}},
}
_COMPLETION = {
    "prompt": ["Hé", "🗻"], "max_tokens": 2, "temperature": 0, "logprobs": 2, "echo": True,
    "n": 1, "best_of": 1, "suffix": None, "stream": False,
}  # fmt: skip
_MESSAGES = {
    "model": "m", "max_tokens": 2, "system": "Be brief.", "messages": [_TALK[1]],
    "stop_sequences": ["x"], "temperature": 0.5, "top_k": 3, "top_p": 0.9,
    "tools": [{"name": "weather", "input_schema": _SCHEMA}], "tool_choice": {"type": "auto"},
}  # fmt: skip
_BLOCKS = {
    "max_tokens": 2, "thinking": {"type": "disabled"},
    "system": [{"type": "text", "text": "é", "cache_control": {"type": "ephemeral"}}],
    "tools": _MESSAGES["tools"], "tool_choice": {"type": "tool", "name": "weather"},
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "Hé"}]},
        {"role": "assistant", "content": [
            {"type": "thinking", "thinking": "Hm", "signature": "s"}, {"type": "text", "text": "a"},
            {"type": "tool_use", "id": "t1", "name": "weather", "input": {"city": "Rome"}},
        ]},
        {"role": "user", "content": [
            {"type": "tool_result", "tool_use_id": "t1", "is_error": True,
             "content": [{"type": "text", "text": "no"}]},
        ]},
    ],
}  # fmt: skip
_RESPONSES = {
    "model": "m", "input": [{"role": "user", "content": "Hé 🗻"}], "instructions": "Be brief.",
    "max_output_tokens": 16, "temperature": 0.5, "top_p": 0.9, "store": False,
    "tools": [{"type": "function", "name": "weather", "parameters": _SCHEMA}],
}  # fmt: skip
_KSERVE = {
    "id": "1",
    "parameters": {"max_new_tokens": 2},
    "inputs": [{"name": "a", "shape": [1], "datatype": "BYTES", "data": [72, 105]}],
    "outputs": [{"name": "b"}],
}
_STREAMED: Mapping[str, Any] = {"stream": True}

_NATIVE_BODIES: Sequence[Any] = (_NATIVE, _CONSTRAINED, _NATIVE | _STREAMED)
_CHAT_BODIES: Sequence[Any] = (_CHAT, _TOOLS, _FORMAT, _CHAT | _STREAMED, _TOOLS | _STREAMED)
_COMPLETION_BODIES: Sequence[Any] = (_COMPLETION, {"prompt": [5, 6], "max_tokens": 1} | _STREAMED)
_ALL_BODIES: Sequence[Any] = (*_NATIVE_BODIES, *_CHAT_BODIES, *_COMPLETION_BODIES)

BODIES: Mapping[str, Sequence[Any]] = {
    "/": _NATIVE_BODIES,
    "/generate": _NATIVE_BODIES,
    "/generate_stream": _NATIVE_BODIES,
    "/tokenize": (*_NATIVE_BODIES, {"prompt": "Hi"}),
    "/detokenize": ({"tokens": [72, 105]},),
    "/v1/completions": _COMPLETION_BODIES,
    "/v1/chat/completions": _CHAT_BODIES,
    "/chat_tokenize": _CHAT_BODIES,
    "/v1/messages": (_MESSAGES, _MESSAGES | _STREAMED, _BLOCKS),
    "/v1/messages/count_tokens": (_MESSAGES, _BLOCKS),
    "/v1/responses": (_RESPONSES, _RESPONSES | _STREAMED),
    "/v1/responses/input_tokens": (_RESPONSES,),
    "/invocations": _ALL_BODIES,
    "/vertex": ({"instances": [_NATIVE, _CHAT]},),
    "/v2/models/{model}/versions/{version}/infer": (_KSERVE,),
}
ODD_VALUES: Sequence[Any] = (
    None, True, -1, 0, 1.5, 2**31, 2**32, 2**63, 2**64, -(2**63), 1e308, float("nan"),
    float("inf"), "", " ", "0", "\ud800", "\0", "x" * 5000, "🗻" * 300, [], {}, [[]], [None], [{}],
    {"": ""}, {"type": "object"}, {"$ref": "#"}, "(" * 200, "(a*)*b", "{{ 1/0 }}", list(range(99)),
)  # fmt: skip


def mutated(random: Random, path: str) -> bytes:
    """A body for `path` that was valid before something happened to it."""
    bodies = BODIES.get(path, _ALL_BODIES)
    body = json.loads(json.dumps(random.choice(bodies)))
    for _ in range(random.choice((0, 1, 1, 2, 3))):
        body = _other_value(random, body)
    text = json.dumps(body, ensure_ascii=random.random() < 0.5)
    raw = bytearray(text.encode(errors="surrogatepass"))
    for _ in range(random.choice((0, 0, 0, 1, 2, 5))):
        random.choice(_BYTE_MUTATIONS)(random, raw)
    return bytes(raw)


def _other_value(random: Random, value: Any) -> Any:
    """The value with one of its parts exchanged, dropped, renamed, copied or wrapped."""
    if not isinstance(value, dict | list) or not value or random.random() < 0.2:
        return copy.deepcopy(random.choice(ODD_VALUES))
    key = random.choice(list(value) if isinstance(value, dict) else range(len(value)))
    if random.random() < 0.6:
        value[key] = _other_value(random, value[key])
    elif isinstance(value, list):
        value[key : key + 1] = random.choice(([], [value[key]] * 3, [[value[key]]]))
    else:
        kept = value.pop(key)
        value |= random.choice(({}, {f"{key}s": kept}, {key: [kept]}, {key: {key: kept}}))
    return value


def _flip(random: Random, raw: bytearray) -> None:
    if raw:
        raw[random.randrange(len(raw))] ^= 1 << random.randrange(8)


def _cut(random: Random, raw: bytearray) -> None:
    start = random.randrange(len(raw) + 1)
    del raw[start : start + random.choice((1, 2, 10, len(raw)))]


def _copy(random: Random, raw: bytearray) -> None:
    start = random.randrange(len(raw) + 1)
    raw[start:start] = raw[start : start + random.choice((1, 5, 50))] * random.choice((1, 2, 20))


def _insert(random: Random, raw: bytearray) -> None:
    start = random.randrange(len(raw) + 1)
    raw[start:start] = random.choice(_ODD_BYTES)


_ODD_BYTES: Sequence[bytes] = (
    b"\0", b"\xff\xfe", b"\xc3", b"\xed\xa0\x80", b"{", b"}", b"[" * 2000, b'"', b"\\", b"\\u",
    b"\\ud83d", b",", b":", b"\r\n\r\n", b"-", b"9" * 400, b"e999", b"null", b"\xef\xbb\xbf",
)  # fmt: skip
_BYTE_MUTATIONS: Sequence[Callable[[Random, bytearray], None]] = (_flip, _cut, _copy, _insert)
