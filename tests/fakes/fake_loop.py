"""A batching loop without a scheduler: plays a script and remembers what it was asked."""

import asyncio
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from kagami_router.request.values import (
    End,
    FinishReason,
    PrefillToken,
    StreamEvent,
    Timings,
    Token,
    ValidRequest,
)
from kagami_router.serving.generation_stream import Events, GenerationStream

EOS = Token(2, "</s>", -0.0625, True)
FAILED = Token(5229, " failed", -2.583984375, False)
COLON = Token(29901, ":", -0.44970703125, False)


def end(
    text: str,
    num_generated: int,
    reason: FinishReason = FinishReason.LENGTH,
    cached_tokens: int = 0,
    stop: str | None = None,
) -> End:
    now = time.monotonic()
    return End(reason, text, num_generated, Timings(now, now, now, now), cached_tokens, stop)


def step_events_of(
    tokens: Iterable[Token],
    reason: FinishReason = FinishReason.LENGTH,
    *,
    tail: str = "",
    prefill: tuple[PrefillToken, ...] = (),
    top_tokens: tuple[Token, ...] = (),
    cached_tokens: int = 0,
    stop: str | None = None,
) -> list[Events]:
    """One event for each step; the last one carries the end."""
    said = list(tokens)
    text = "".join(token.text for token in said if not token.special) + tail
    events = [StreamEvent(token, top_tokens) for token in said[:-1]]
    events.append(
        StreamEvent(said[-1], top_tokens, tail, end(text, len(said), reason, cached_tokens, stop))
    )
    events[0] = events[0]._replace(prefill=prefill)
    return [(event,) for event in events]


def failed_colon(request: ValidRequest) -> list[Events | Exception]:
    """What TGI's golden transcripts show: " failed:"."""
    top = (FAILED, COLON)[: request.top_n_tokens]
    prefill = tuple(
        PrefillToken(token_id, "", -1.5 if index else None)
        for index, token_id in enumerate(request.prompt_ids)
    )
    return [
        *step_events_of(
            [FAILED, COLON], top_tokens=top, prefill=prefill if request.prompt_logprobs else ()
        )
    ]


@dataclass(eq=False)
class FakeLoop:
    """`play` gives the script of a request: the events of each step, or an exception that ends it.

    Before each step after the first the stream waits until `gate` is set. `held` is set when a
    stream waits there: the events of its first step have been delivered.
    """

    play: Callable[[ValidRequest], list[Events | Exception]] = failed_colon
    requests: list[ValidRequest] = field(default_factory=list)
    num_open: int = 0
    is_healthy: bool = True

    def __post_init__(self) -> None:
        self.gate = asyncio.Event()
        self.gate.set()
        self.held = asyncio.Event()
        self.entered = asyncio.Event()
        self.left = asyncio.Event()

    def submit(self, request: ValidRequest, stream: GenerationStream) -> Callable[[], None]:
        self.requests.append(request)
        self.num_open += 1
        self.entered.set()
        playing = asyncio.ensure_future(self._play(self.play(request), stream))

        def leave() -> None:
            playing.cancel()
            self.num_open -= 1
            self.left.set()

        return leave

    async def _play(self, script: list[Events | Exception], stream: GenerationStream) -> None:
        for number, events in enumerate(script):
            if number and not self.gate.is_set():
                self.held.set()
                await self.gate.wait()
            if isinstance(events, Exception):
                stream.fail(events)
                return
            stream.put(events)
