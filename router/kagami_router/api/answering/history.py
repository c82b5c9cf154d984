"""Reads what clients send back of a conversation: the arguments of calls, and the parts of a text.

The same for every chat route: each gives the place in its own body, which errors name.
"""

import json
from collections.abc import Mapping
from typing import Any

from kagami_proto.errors import InvalidRequest, MalformedBody
from kagami_router.text.templates.values import Arguments

_TEXT_PARTS: Mapping[str, str] = {  # type of a part -> the member that has its text
    "text": "text",
    "input_text": "text",
    "output_text": "text",
    "refusal": "refusal",
}
_MEDIA: Mapping[str, str] = {
    "image_url": "an image",
    "input_image": "an image",
    "image_file": "an image",
    "input_audio": "an audio",
    "audio_url": "an audio",
    "video_url": "a video",
    "file": "a file",
    "input_file": "a file",
}
_QUOTED = 80  # characters of a value that an error shows


def read_arguments(place: str, given: object) -> Arguments:
    """The arguments that a client sends back: an object, or its JSON text.

    Clients write a call without arguments in many ways: absent, null, "", "null", "{}". Raises
    `InvalidRequest` for all else.
    """
    if isinstance(given, Mapping):
        return Arguments(json.dumps(given, ensure_ascii=False), given)
    value = given
    if isinstance(given, str):
        try:
            value = json.loads(given) if given.strip() else None
        except (ValueError, RecursionError) as error:
            raise _bad_arguments(place, given) from error
    if value is None:
        return Arguments("{}", {})
    if not isinstance(given, str) or not isinstance(value, dict):
        raise _bad_arguments(place, given)
    return Arguments(given, value)


def _bad_arguments(place: str, given: object) -> InvalidRequest:
    return InvalidRequest(
        f"`{place}` must be an object, or the JSON text of one. Given: {str(given)[:_QUOTED]!r}",
        field=place,
    )


def read_calls(place: str, given: object) -> list[dict[str, Any]]:
    """`tool_calls` of a message in OpenAI's form; raises `InvalidRequest`."""
    if not isinstance(given, list):
        raise MalformedBody(f"{place}: expected a list of calls", field=place)
    return [_read_call(f"{place}[{number}]", call) for number, call in enumerate(given)]


def _read_call(place: str, call: object) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(call, dict) or not isinstance(function, dict):
        raise MalformedBody(
            f'{place}: expected {{"id":…,"type":"function","function":…}}', field=place
        )
    name = "arguments" if "arguments" in function else "parameters"
    arguments = read_arguments(f"{place}.function.arguments", function.get(name))
    return {**call, "function": {**function, "arguments": arguments}}


def read_part(place: str, part: object) -> str:
    """The text of one part of a content; raises `InvalidRequest` for a part that has none."""
    kind = part.get("type") if isinstance(part, dict) else None
    if not isinstance(part, dict) or not isinstance(kind, str):
        raise MalformedBody(f'{place}: expected {{"type":"text","text":…}}', field=place)
    if kind in _MEDIA:
        raise InvalidRequest(
            f"`{place}` is {_MEDIA[kind]} (`{kind}`), and this model reads text only", field=place
        )
    member = _TEXT_PARTS.get(kind)
    if member is None:
        raise MalformedBody(
            f"{place}: expected one of the types {', '.join(_TEXT_PARTS)}."
            f" Given: {kind[:_QUOTED]!r}",
            field=place,
        )
    return read_text(place, part, member)


def read_text(place: str, item: Mapping[str, Any], name: str) -> str:
    """The text that `item` has under `name`; raises `MalformedBody`."""
    value = item.get(name)
    if value is None:
        raise MalformedBody(f"{place}: missing field `{name}`", field=place)
    if not isinstance(value, str):
        raise MalformedBody(f"{place}.{name}: expected a string", field=f"{place}.{name}")
    return value
