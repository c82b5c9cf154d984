"""Values that templates read in two ways: what is no text and prints as one.

They travel to the rendering process: nothing heavy is imported here.
"""

from collections.abc import Mapping
from typing import Any


class NoContent(str):
    """The content of a message without content: an empty text that also `is none`.

    Most templates concatenate the content with texts, where None raises or prints "None". Some
    (DeepSeek's) ask whether it `is none` to find the messages with tool calls.
    """

    __slots__ = ()


class Arguments(dict[str, Any]):
    """A call's arguments, as an object and as text.

    Most templates read an object. Some (DeepSeek's) concatenate the arguments with text; they get
    the JSON text that the client sent.
    """

    def __init__(self, text: str, value: Mapping[str, Any]) -> None:
        super().__init__(value)
        self._text = text

    def __reduce__(self) -> tuple[type["Arguments"], tuple[str, dict[str, Any]]]:
        return Arguments, (self._text, dict(self))

    def __str__(self) -> str:
        return self._text

    def __radd__(self, before: str) -> str:
        return before + self._text

    def __add__(self, after: str) -> str:
        return self._text + after
