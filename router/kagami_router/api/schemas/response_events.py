"""The events in which a Response grows; the tag of each is its name."""

from msgspec import Struct

from kagami_router.api.schemas.openai import ChatLogprob
from kagami_router.api.schemas.responses import (
    OutputItem,
    OutputText,
    ReasoningText,
    ResponseObject,
)


class ResponseEvent(Struct, frozen=True, tag_field="type"):
    """One event; they count from 0."""

    sequence_number: int


class ResponseCreated(ResponseEvent, frozen=True, tag="response.created"):
    """The first event."""

    response: ResponseObject


class ResponseInProgress(ResponseEvent, frozen=True, tag="response.in_progress"):
    """The second."""

    response: ResponseObject


class ResponseCompleted(ResponseEvent, frozen=True, tag="response.completed"):
    """The last event of an answer that is whole."""

    response: ResponseObject


class ResponseIncomplete(ResponseEvent, frozen=True, tag="response.incomplete"):
    """The last event of an answer that was cut."""

    response: ResponseObject


class ResponseFailed(ResponseEvent, frozen=True, tag="response.failed"):
    """The last event of an answer that failed; an `error` comes before it."""

    response: ResponseObject


class OutputItemAdded(ResponseEvent, frozen=True, tag="response.output_item.added"):
    """An item begins, empty."""

    output_index: int
    item: OutputItem


class OutputItemDone(ResponseEvent, frozen=True, tag="response.output_item.done"):
    """An item is whole."""

    output_index: int
    item: OutputItem


class ContentPartAdded(ResponseEvent, frozen=True, tag="response.content_part.added"):
    """A text begins, empty."""

    item_id: str
    output_index: int
    content_index: int
    part: OutputText | ReasoningText


class ContentPartDone(ResponseEvent, frozen=True, tag="response.content_part.done"):
    """A text is whole."""

    item_id: str
    output_index: int
    content_index: int
    part: OutputText | ReasoningText


class OutputTextDelta(ResponseEvent, frozen=True, tag="response.output_text.delta"):
    """More of a message's text."""

    item_id: str
    output_index: int
    content_index: int
    delta: str
    logprobs: list[ChatLogprob]


class OutputTextDone(ResponseEvent, frozen=True, tag="response.output_text.done"):
    """A message's text, whole."""

    item_id: str
    output_index: int
    content_index: int
    text: str
    logprobs: list[ChatLogprob]


class ReasoningTextDelta(ResponseEvent, frozen=True, tag="response.reasoning_text.delta"):
    """More of what the model thinks."""

    item_id: str
    output_index: int
    content_index: int
    delta: str


class ReasoningTextDone(ResponseEvent, frozen=True, tag="response.reasoning_text.done"):
    """What the model thought, whole."""

    item_id: str
    output_index: int
    content_index: int
    text: str


class CallArgumentsDelta(ResponseEvent, frozen=True, tag="response.function_call_arguments.delta"):
    """More of a call's arguments."""

    item_id: str
    output_index: int
    delta: str


class CallArgumentsDone(ResponseEvent, frozen=True, tag="response.function_call_arguments.done"):
    """A call's arguments, whole."""

    item_id: str
    output_index: int
    name: str
    arguments: str


class CustomInputDelta(ResponseEvent, frozen=True, tag="response.custom_tool_call_input.delta"):
    """The text of a custom call; it comes in one piece."""

    item_id: str
    output_index: int
    delta: str


class CustomInputDone(ResponseEvent, frozen=True, tag="response.custom_tool_call_input.done"):
    """The text of a custom call, whole."""

    item_id: str
    output_index: int
    input: str


class ResponseErrorEvent(ResponseEvent, frozen=True, tag="error"):
    """What went wrong after the stream had begun."""

    code: str | None
    message: str
    param: str | None


RESPONSE_EVENTS = (
    ResponseCreated,
    ResponseInProgress,
    OutputItemAdded,
    ContentPartAdded,
    OutputTextDelta,
    OutputTextDone,
    ContentPartDone,
    ReasoningTextDelta,
    ReasoningTextDone,
    CallArgumentsDelta,
    CallArgumentsDone,
    CustomInputDelta,
    CustomInputDone,
    OutputItemDone,
    ResponseCompleted,
    ResponseIncomplete,
    ResponseErrorEvent,
    ResponseFailed,
)
