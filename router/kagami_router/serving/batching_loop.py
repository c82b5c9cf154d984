"""The only driver: schedule, call the shards, update, deliver.

Results drive it: the step stream hands over what a step brought, text is made of it, and the next
step leaves, all in one pass on the event loop's thread (one or two steps are in flight). Between
passes a task sends steps when somebody came or left.

Ids say whether a sequence ended by EOS, text whether by a stop string; both count before length.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable
from functools import partial

import tokenizers
from opentelemetry import trace

from kagami_proto.errors import GenerationFailed, KagamiError, ShardLost
from kagami_proto.tracing import NO_TRACING, Tracing
from kagami_router.request.values import (
    End,
    FinishReason,
    PrefillToken,
    StreamEvent,
    Timings,
    Token,
    ValidRequest,
    plain_event,
)
from kagami_router.scheduler.scheduler import Scheduler
from kagami_router.scheduler.sequence import Sequence
from kagami_router.scheduler.step import (
    Event,
    SequenceFailed,
    Step,
    StepResults,
    TokenSampled,
    VectorComputed,
)
from kagami_router.serving.generation_stream import GenerationStream
from kagami_router.shards.client import ShardGroup
from kagami_router.shards.stream import StepStream
from kagami_router.telemetry.metrics import Metrics, StepReport
from kagami_router.telemetry.sequence_trace import SequenceTrace, WireContext
from kagami_router.text.detokenize import Detokenizer, TextDecoder
from kagami_router.text.stopping import StopMatcher

logger = logging.getLogger(__name__)

# A step takes milliseconds to seconds; the largest prefill on a slow CPU stays well below.
STEP_OVERDUE_S = 60.0
# In a row. Finding one culprit among 128, or the size that fits the memory, takes some 10; a
# device with a sticky error fails them all.
MAX_FAILED_STEPS = 16
# The integrity check walks the whole pool: only when nobody is likely to come just now.
IDLE_CHECK_S = 1.0


class _Generation:
    """What the loop keeps of one sequence: its stream and its text so far."""

    __slots__ = (
        "detokenizer",
        "device_before_s",
        "first_token",
        "is_plain",
        "sequence",
        "stop",
        "stream",
        "texts",
    )

    def __init__(
        self,
        sequence: Sequence,
        stream: GenerationStream,
        detokenizer: Detokenizer,
        stop: StopMatcher | None,
    ) -> None:
        self.sequence = sequence
        self.stream = stream
        self.detokenizer = detokenizer
        self.stop = stop
        self.texts: list[str] = []  # what each token added
        self.first_token: float | None = None
        self.is_plain = False  # after its first token, where only text can be expected
        self.device_before_s: float | None = None  # of all steps before its first


_Outcome = tuple[GenerationStream, StreamEvent | KagamiError]


class BatchingLoop:
    """Drives one scheduler and the shards of one model."""

    def __init__(
        self,
        shards: ShardGroup,
        scheduler: Scheduler,
        *,
        tokenizer: tokenizers.Tokenizer,
        eos_token_ids: frozenset[int],
        metrics: Metrics,
        tracing: Tracing = NO_TRACING,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._shards = shards
        self._scheduler = scheduler
        self._decoder = TextDecoder(tokenizer, eos_token_ids)
        self._eos_token_ids = eos_token_ids
        self._unlike_text = eos_token_ids.union(self._decoder.special)
        self._metrics = metrics
        self._tracing = tracing
        # Of sampled requests only.
        self._traces: dict[int, SequenceTrace] = {}
        self._device_s = 0.0  # of all steps so far
        self._spans_dropped_by_shards = 0
        self._clock = clock
        self._generations: dict[int, _Generation] = {}
        # Steps in flight, each with the time it was sent.
        self._sent: deque[tuple[Step, float]] = deque()
        self._last_progress = 0.0
        self._num_failed_steps = 0  # in a row
        self._wake = asyncio.Event()
        self._steps: StepStream | None = None  # while it stands
        self._gone: KagamiError | None = None

    @property
    def is_healthy(self) -> bool:
        """Whether the step stream stands, steps still succeed, and none is overdue."""
        if self._steps is None or self._num_failed_steps >= MAX_FAILED_STEPS:
            return False
        if not self._sent:
            return True
        since = max(self._sent[0][1], self._last_progress)
        return self._clock() - since <= STEP_OVERDUE_S

    @property
    def spans_dropped(self) -> int:
        """Spans that no collector has seen: ours, and the shards' as of their last step."""
        return self._tracing.spans_dropped + self._spans_dropped_by_shards

    @property
    def decoder(self) -> TextDecoder:
        """What makes its text."""
        return self._decoder

    @property
    def idle(self) -> bool:
        return self._scheduler.is_idle

    def submit(self, request: ValidRequest, stream: GenerationStream) -> Callable[[], None]:
        """Queue one generation, whose events go to `stream`; the result cancels it."""
        if self._gone is not None:
            stream.fail(self._gone)
            return _nothing_to_cancel
        now = self._clock()
        sequence = self._scheduler.add(request, now)
        if trace.get_current_span().is_recording():
            ahead = self._scheduler.stats().waiting - 1
            self._traces[sequence.id] = SequenceTrace(self._tracing, sequence, now, ahead=ahead)
        stopping = request.stopping
        self._generations[sequence.id] = _Generation(
            sequence,
            stream,
            self._decoder.start(request.prompt_ids),
            StopMatcher(stopping.stop, keep_stop=stopping.keep_stop) if stopping.stop else None,
        )
        self._wake.set()
        return partial(self._cancel, sequence.id)

    def _cancel(self, sequence_id: int) -> None:
        if self._generations.pop(sequence_id, None) is not None:
            self._scheduler.cancel(sequence_id)
            if traced := self._traces.pop(sequence_id, None):
                traced.cancelled(self._clock())
            self._wake.set()

    async def run(self) -> None:
        """Serve until cancelled. Raises `ShardLost` when the step stream broke.

        However it ends, every open request is told.
        """
        gone: KagamiError = GenerationFailed("the server is shutting down")
        try:
            async with self._shards.open_steps(self._finish_step) as steps:
                self._steps = steps
                async with asyncio.TaskGroup() as tasks:
                    tasks.create_task(self._send_when_woken(), name="send steps")
                    tasks.create_task(steps.lost(), name="watch shards")
        except ExceptionGroup as group:
            lost, bugs = group.split(ShardLost)
            if bugs is not None or lost is None:
                gone = GenerationFailed("internal error")
                raise
            gone = ShardLost(str(lost.exceptions[0]))
            raise gone from group
        except ShardLost as lost:
            gone = lost
            raise
        finally:
            self._steps = None
            self._fail_everybody(gone)

    async def _send_when_woken(self) -> None:
        """Somebody came or left; what results make possible is sent as they come."""
        while True:
            self._send_steps()
            self._wake.clear()
            await self._wait_for_work()

    def _send_steps(self) -> None:
        """As many as the scheduler gives: one or two are in flight then."""
        while self._steps is not None:
            now = self._clock()
            step = self._scheduler.schedule(now)
            contexts = self._trace_schedule(step, now) if self._traces else {}
            if step is None:
                return
            self._sent.append((step, now))
            self._metrics.step_sent(step)
            self._steps.send(step, contexts)

    def _finish_step(self, results: StepResults) -> None:
        """The results of the oldest step in flight have come: the next one leaves."""
        self._take_results(results)
        self._send_steps()
        if self._scheduler.is_idle:
            self._wake.set()  # the pool is checked when nobody comes

    def _trace_schedule(self, step: Step | None, now: float) -> dict[int, WireContext]:
        """Tell the traces what was decided; what the shards need of those that join."""
        contexts: dict[int, WireContext] = {}
        if step is not None:
            for sequence in step.preempted:
                if traced := self._traces.get(sequence.id):
                    traced.preempted(now)
            for new in step.new_sequences:
                if traced := self._traces.get(new.id):
                    contexts[new.id] = traced.admitted(new, now)
        for traced in self._traces.values():
            if traced.is_queued:
                traced.waits(now)
        return contexts

    async def _wait_for_work(self) -> None:
        if self._scheduler.is_idle:
            try:
                async with asyncio.timeout(IDLE_CHECK_S):
                    await self._wake.wait()
            except TimeoutError:
                if self._scheduler.is_idle:
                    self._scheduler.check_integrity()
        await self._wake.wait()

    def _take_results(self, results: StepResults) -> None:
        """One step's results: move sequences on, make text, tell clients and metrics."""
        now = self._clock()
        step, sent_at = self._sent.popleft()
        # Behind another step the shards begin with this one only when that is done.
        wall_s = now - max(sent_at, self._last_progress)
        self._last_progress = now
        self._num_failed_steps = self._num_failed_steps + 1 if results.error else 0
        self._see_times(step, results, now)
        events = self._scheduler.update(results)
        updated = self._clock()
        outcomes = self._outcomes_of(events, now)
        if results.error:
            logger.error(
                "Step failed",
                extra={
                    "step": step.number,
                    "sequences": len(step.work),
                    "out_of_memory": results.out_of_memory,
                    "error": results.error,
                },
            )
        texts_made = self._clock()
        num_tokens = 0
        for stream, outcome in outcomes:
            if isinstance(outcome, StreamEvent):
                stream.put((outcome,))
                num_tokens += 1
            else:
                stream.fail(outcome)
        if not step.work:
            return
        report = StepReport(
            wall_s, updated - now, texts_made - updated, self._clock() - texts_made, num_tokens
        )
        self._metrics.step_finished(step, results, report)

    def _outcomes_of(self, events: list[Event], now: float) -> list[_Outcome]:
        """What each event brings to its stream. A text that goes wrong ends that sequence only."""
        outcomes: list[_Outcome] = []
        generations, unlike_text = self._generations, self._unlike_text
        for event in events:
            sequence = event.sequence
            generation = generations.get(sequence.id)
            if generation is None:
                continue
            outcome: StreamEvent | KagamiError
            try:
                if not isinstance(event, TokenSampled):
                    outcome = self._ended_without_text(event, now)
                elif (
                    generation.is_plain
                    and not event.is_last
                    and (event.token_id not in unlike_text)
                ):
                    text = generation.detokenizer.step(event.token_id)
                    generation.texts.append(text)
                    outcome = plain_event(event.token_id, text, event.logprob)
                else:
                    outcome = self._new_event(generation, event, now)
            except (KeyboardInterrupt, SystemExit):
                raise
            # A border: a bug in one sequence's text must not stop the others' steps. A panic of the
            # tokenizers library is no `Exception`.
            except BaseException:
                logger.exception("Text failed", extra={"request_id": sequence.id})
                self._cancel(sequence.id)
                outcome = GenerationFailed("internal error")
            outcomes.append((generation.stream, outcome))
        return outcomes

    def _ended_without_text(
        self, event: SequenceFailed | VectorComputed, now: float
    ) -> GenerationFailed:
        """It failed; or it has a vector, which no route asks for and no stream of text carries."""
        message = event.message if isinstance(event, SequenceFailed) else "vectors are not served"
        del self._generations[event.sequence.id]
        if traced := self._traces.pop(event.sequence.id, None):
            traced.failed(message, now)
        return GenerationFailed(message)

    def _see_times(self, step: Step, results: StepResults, now: float) -> None:
        """Tell the traces of a step, and count the device's time for all who were in it."""
        if self._traces:
            failed = {failure.sequence_id for failure in results.failures}
            for work in step.work:
                traced = self._traces.get(work.sequence.id)
                if traced is not None and work.sequence.id not in failed:
                    traced.stepped(work, step, results, now)
        for new in step.new_sequences:
            if (started := self._generations.get(new.id)) and started.device_before_s is None:
                started.device_before_s = self._device_s
        self._device_s += results.device_ns / 1e9
        self._spans_dropped_by_shards = results.spans_dropped

    def _new_event(self, generation: _Generation, event: TokenSampled, now: float) -> StreamEvent:
        token_id = event.token_id
        prefill: tuple[PrefillToken, ...] = ()
        if generation.first_token is None:
            generation.first_token = now
            generation.is_plain = self._is_plain(generation)
            prefill = self._prefill(event.sequence)
        is_end = token_id in self._eos_token_ids and not event.sequence.request.stopping.ignore_eos
        reason = FinishReason.EOS_TOKEN if is_end else None
        special = self._decoder.special.get(token_id)
        shown = "" if special is not None else generation.detokenizer.step(token_id)
        if generation.stop is not None and not is_end:
            # A special token is no text, but what it stands for may complete a stop string.
            shown, is_stopped = (
                generation.stop.push(shown)
                if special is None
                else generation.stop.push(special, is_shown=False)
            )
            if is_stopped:
                reason = FinishReason.STOP_SEQUENCE
        if reason is None and event.is_last:
            reason = FinishReason.LENGTH
        top_tokens = (
            tuple(self._top_token(top.id, top.logprob) for top in event.top_tokens)
            if event.top_tokens
            else ()
        )
        tail = generation.stop.rest() if reason is not None and generation.stop is not None else ""
        generation.texts.append(shown + tail)
        if special is None:
            token = Token(token_id, shown, event.logprob, False)
        else:  # what it freed goes out beside it
            token, tail = Token(token_id, special, event.logprob, True), shown + tail
        end = None if reason is None else self._end(generation, reason, now)
        return StreamEvent(token, top_tokens, tail, end, prefill)

    def _is_plain(self, generation: _Generation) -> bool:
        return generation.stop is None and not generation.sequence.request.top_n_tokens

    def _top_token(self, token_id: int, logprob: float) -> Token:
        is_special = token_id in self._decoder.special
        return Token(token_id, self._decoder.text_of(token_id), logprob, is_special)

    def _end(self, generation: _Generation, reason: FinishReason, now: float) -> End:
        sequence = generation.sequence
        self._scheduler.finish(sequence)
        del self._generations[sequence.id]
        assert sequence.scheduled_at is not None
        assert generation.first_token is not None
        assert generation.device_before_s is not None
        end = End(
            finish_reason=reason,
            generated_text="".join(generation.texts),
            # Not those of the log: a step may bring tokens behind the last one.
            num_generated=len(generation.texts),
            timings=Timings(
                submitted=sequence.added_at,
                scheduled=sequence.scheduled_at,
                first_token=generation.first_token,
                finished=now,
                device_s=self._device_s - generation.device_before_s,
            ),
            cached_tokens=sequence.cached_tokens,
            stop=generation.stop.found if generation.stop is not None else None,
        )
        if traced := self._traces.pop(sequence.id, None):
            traced.finished(end, now)
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

    def _fail_everybody(self, error: KagamiError) -> None:
        self._gone = error
        generations, self._generations = self._generations, {}
        for sequence_id, generation in generations.items():
            self._scheduler.cancel(sequence_id)
            if traced := self._traces.pop(sequence_id, None):
                traced.failed(str(error), self._clock())
            generation.stream.fail(error)


def _nothing_to_cancel() -> None:
    """For a generation that never began."""
