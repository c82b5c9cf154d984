"""Tokens become text: the events and the end of every open sequence.

Ids say whether a sequence ended by EOS, text whether by a stop string; both count before length.
Owns what has been said and what is held back for a stop string. Knows no shard and no step.
"""

import logging
from collections.abc import Callable

from kagami_proto.errors import GenerationFailed, KagamiError
from kagami_proto.panics import exception_of
from kagami_router.request.values import (
    End,
    FinishReason,
    PrefillToken,
    StreamEvent,
    Timings,
    Token,
    Watch,
    text_event,
)
from kagami_router.scheduler.sequence import Sequence
from kagami_router.scheduler.step import Event, SequenceFailed, Step, TokenSampled, VectorComputed
from kagami_router.serving.generation_stream import GenerationStream
from kagami_router.text.detokenize import Detokenizer, TextDecoder
from kagami_router.text.stopping import StopMatcher

logger = logging.getLogger(__name__)

Outcome = tuple[GenerationStream, StreamEvent | KagamiError]
"""What one token, or a failure, brings to the stream of its request."""


class OpenText:
    """What one sequence has said until now, and where its events go."""

    __slots__ = (
        "detokenizer",
        "device_before_s",
        "first_token",
        "has_text_only",
        "sequence",
        "stop",
        "stream",
        "texts",
        "watch",
    )

    def __init__(
        self,
        sequence: Sequence,
        stream: GenerationStream,
        detokenizer: Detokenizer,
        stop: StopMatcher | None,
        watch: Watch | None,
    ) -> None:
        self.sequence = sequence
        self.stream = stream
        self.detokenizer = detokenizer
        self.stop = stop
        self.watch = watch
        self.texts: list[str] = []
        """What each token added"""
        self.first_token: float | None = None
        self.has_text_only = False
        """Behind its first token, where nothing but text is asked for"""
        self.device_before_s: float | None = None
        """Device time of all steps before its first"""


class TextWriter:
    """Owns the text of every sequence that has not ended.

    `closed` is called once for each sequence that ends here: with its end, or with what it failed
    with. It is not called for one that `close` took away.
    """

    def __init__(
        self,
        decoder: TextDecoder,
        eos_token_ids: frozenset[int],
        closed: Callable[[Sequence, End | KagamiError], None],
    ) -> None:
        self._decoder = decoder
        self._eos_token_ids = eos_token_ids
        self._unlike_text = eos_token_ids.union(decoder.special)
        self._closed = closed
        self._open: dict[int, OpenText] = {}
        self._device_s = 0.0  # of all steps until now

    def open(self, sequence: Sequence, stream: GenerationStream) -> None:
        """From now on the tokens of a sequence become events of `stream`."""
        stopping = sequence.request.stopping
        self._open[sequence.id] = OpenText(
            sequence,
            stream,
            self._decoder.start(sequence.request.prompt_ids),
            StopMatcher(stopping.stop, keep_stop=stopping.keep_stop) if stopping.stop else None,
            stopping.new_watch() if stopping.new_watch else None,
        )

    def close(self, sequence_id: int) -> bool:
        """Forget a sequence; False if it ended already."""
        return self._open.pop(sequence_id, None) is not None

    def fail_all(self, error: KagamiError) -> None:
        """End every stream with `error`."""
        texts, self._open = self._open, {}
        for text in texts.values():
            self._closed(text.sequence, error)
            text.stream.fail(error)

    def see_step(self, step: Step, device_ns: int) -> None:
        """Count the device's time for all who were in a step; comes before its tokens."""
        for new in step.new_sequences:
            if (text := self._open.get(new.id)) and text.device_before_s is None:
                text.device_before_s = self._device_s
        self._device_s += device_ns / 1e9

    def write(self, events: list[Event], now: float) -> list[Outcome]:
        """What each event brings to its stream. A text that goes wrong ends that sequence only."""
        outcomes: list[Outcome] = []
        texts, unlike_text = self._open, self._unlike_text
        for event in events:
            sequence = event.sequence
            text = texts.get(sequence.id)
            if text is None:
                continue
            outcome: StreamEvent | KagamiError
            try:
                if not isinstance(event, TokenSampled):
                    outcome = self._failed(event)
                elif (
                    text.has_text_only and not event.is_last and (event.token_id not in unlike_text)
                ):
                    added = text.detokenizer.step(event.token_id)
                    text.texts.append(added)
                    outcome = text_event(event.token_id, added, event.logprob)
                else:
                    outcome = self._event(text, event, now)
            # A border: a bug in one sequence's text must not stop the others' steps.
            except BaseException as error:
                extra = {"request_id": sequence.id}
                logger.error("Text failed", exc_info=exception_of(error), extra=extra)
                outcome = self._close_with(sequence, GenerationFailed("internal error"))
            outcomes.append((text.stream, outcome))
        return outcomes

    def _failed(self, event: SequenceFailed | VectorComputed) -> GenerationFailed:
        """It failed; or it has a vector, which no route asks for and no stream of text carries."""
        message = event.message if isinstance(event, SequenceFailed) else "vectors are not served"
        return self._close_with(event.sequence, GenerationFailed(message))

    def _close_with(self, sequence: Sequence, error: GenerationFailed) -> GenerationFailed:
        del self._open[sequence.id]
        self._closed(sequence, error)
        return error

    def _event(self, text: OpenText, event: TokenSampled, now: float) -> StreamEvent:
        token_id = event.token_id
        prefill: tuple[PrefillToken, ...] = ()
        if text.first_token is None:
            text.first_token = now
            request = event.sequence.request
            has_more = request.top_n_tokens or request.stopping.token_ids
            text.has_text_only = text.stop is None and text.watch is None and not has_more
            prefill = self._prefill(event.sequence)
        stopping = event.sequence.request.stopping
        is_end = token_id in stopping.token_ids or (
            token_id in self._eos_token_ids and not stopping.ignore_eos
        )
        reason = FinishReason.EOS_TOKEN if is_end else None
        special = self._decoder.special.get(token_id)
        shown = "" if special is not None else text.detokenizer.step(token_id)
        if text.stop is not None and not is_end:
            # A special token is no text, but what it stands for may complete a stop string.
            shown, is_stopped = (
                text.stop.push(shown)
                if special is None
                else text.stop.push(special, is_shown=False)
            )
            if is_stopped:
                reason = FinishReason.STOP_SEQUENCE
        if special is None:
            token, tail = Token(token_id, shown, event.logprob, False), ""
        else:  # what it freed goes out beside it
            token, tail = Token(token_id, special, event.logprob, True), shown
        if reason is None and text.watch is not None and text.watch.is_enough(token, tail):
            reason = FinishReason.STOP_SEQUENCE
        if reason is None and event.is_last:
            reason = FinishReason.LENGTH
        top_tokens = (
            tuple(self._top_token(top.id, top.logprob) for top in event.top_tokens)
            if event.top_tokens
            else ()
        )
        rest = text.stop.rest() if reason is not None and text.stop is not None else ""
        text.texts.append(shown + rest)
        end = None if reason is None else self._end(text, reason, now)
        return StreamEvent(token, top_tokens, tail + rest, end, prefill)

    def _top_token(self, token_id: int, logprob: float) -> Token:
        is_special = token_id in self._decoder.special
        return Token(token_id, self._decoder.text_of(token_id), logprob, is_special)

    def _end(self, text: OpenText, reason: FinishReason, now: float) -> End:
        sequence = text.sequence
        assert sequence.scheduled_at is not None
        assert text.first_token is not None
        assert text.device_before_s is not None
        end = End(
            finish_reason=reason,
            generated_text="".join(text.texts),
            # Not those of the log: a step may bring tokens behind the last one.
            num_generated=len(text.texts),
            timings=Timings(
                submitted=sequence.added_at,
                scheduled=sequence.scheduled_at,
                first_token=text.first_token,
                finished=now,
                device_s=self._device_s - text.device_before_s,
            ),
            cached_tokens=sequence.cached_tokens,
            stop=text.stop.found if text.stop is not None else None,
        )
        del self._open[sequence.id]
        self._closed(sequence, end)
        return end

    def _prefill(self, sequence: Sequence) -> tuple[PrefillToken, ...]:
        if not sequence.request.prompt_logprobs:
            return ()
        log = sequence.log
        return tuple(
            PrefillToken(
                token_id,
                self._decoder.text_of(token_id),
                logprob,
                tuple(self._top_token(*one) for one in top),
            )
            for token_id, logprob, top in zip(
                log.prompt_ids, log.prompt_logprobs(), log.prompt_top_tokens(), strict=True
            )
        )
