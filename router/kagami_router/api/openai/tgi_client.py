"""Knows TGI's own Python clients by their body, and writes a chat's stream as they read it.

`text-generation` 0.7 and `tgi` 2.4, which LlamaIndex uses, want a role in every delta, one call in
`tool_calls` in the place of a list, and no end marker. OpenAI's clients add up what repeats.
"""

from typing import Any, Literal

import msgspec
from msgspec import UNSET, Raw, Struct, UnsetType

from kagami_router.api.schemas.encoding import encode
from kagami_router.api.schemas.openai import ChatDelta, ToolCallDelta

# Both write Python's JSON with the members in one order. It spares other bodies a second reading.
_BEGIN = b'{"model": "tgi", "messages": ['


class _Body(Struct, forbid_unknown_fields=True):
    """Every parameter that these clients know, and nothing else: they send all, most as null."""

    model: Literal["tgi"]
    messages: Raw
    repetition_penalty: float | None
    frequency_penalty: float | None
    logit_bias: list[float] | None
    logprobs: bool | None
    top_logprobs: int | None
    max_tokens: int | None
    n: int | None
    presence_penalty: float | None
    stream: bool
    seed: int | None
    temperature: float | None
    top_p: float | None
    tools: Raw
    tool_choice: str | None
    tool_prompt: str | UnsetType | None = UNSET
    stop: list[str] | UnsetType | None = UNSET


_DECODER = msgspec.json.Decoder(_Body)


def is_tgi_client(body: bytes) -> bool:
    """Whether one of TGI's clients has sent this body of a chat."""
    if not body.startswith(_BEGIN):
        return False
    try:
        _DECODER.decode(body)
    except msgspec.DecodeError:
        return False
    return True


class TgiDeltas:
    """Writes the deltas of one chat."""

    text = (b'{"role":"assistant","content":', b',"tool_calls":null}')

    """The JSON of a delta before its text, and after it"""

    def __init__(self) -> None:
        self._ids: dict[tuple[int, int], str] = {}  # by choice and call

    def written(self, choice: int, delta: ChatDelta) -> bytes:
        """The delta with all members that a client asks for."""
        members: dict[str, Any] = {"role": "assistant", "content": None, "tool_calls": None}
        members |= msgspec.to_builtins(delta)
        if delta.tool_calls is not UNSET:
            members["tool_calls"] = self._call(choice, delta.tool_calls[0])
        return encode(members)

    def _call(self, choice: int, call: ToolCallDelta) -> dict[str, Any]:
        key = (choice, call.index)
        if call.id is not UNSET:
            self._ids[key] = call.id
        function = {"name": None, "arguments": ""} | msgspec.to_builtins(call.function)
        return {
            "index": call.index,
            "id": self._ids[key],
            "type": "function",
            "function": function,
        }
