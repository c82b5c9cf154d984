"""The only driver: schedule, call the shards, update, deliver.

Results drive it: the step stream hands over what a step brought, text is made of it, and the next
step leaves, all in one pass on the event loop's thread (one or two steps are in flight). Between
passes a task sends steps when somebody came or left. Text is made in `text_writer.py`.
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
from kagami_router.request.values import End, StreamEvent, ValidRequest
from kagami_router.scheduler.sequence import Sequence
from kagami_router.scheduler.step import Step, StepResults
from kagami_router.serving.generation_stream import GenerationStream
from kagami_router.serving.text_writer import Outcome, TextWriter
from kagami_router.shards.session import ShardSession
from kagami_router.shards.stream import StepStream
from kagami_router.telemetry.metrics import Metrics, StepReport
from kagami_router.telemetry.sequence_trace import SequenceTrace, WireContext
from kagami_router.text.detokenize import TextDecoder

logger = logging.getLogger(__name__)

# A step takes milliseconds to seconds; the largest prefill on a slow CPU stays well below.
STEP_OVERDUE_S = 60.0
# In a row. Finding one culprit among 128, or the size that fits the memory, takes some 10; a
# device with a sticky error fails them all.
MAX_FAILED_STEPS = 16
# The integrity check walks the whole pool: only when nobody is likely to come just now.
IDLE_CHECK_S = 1.0


class BatchingLoop:
    """Drives the shards of one model with the steps that the scheduler makes."""

    def __init__(
        self,
        session: ShardSession,
        *,
        tokenizer: tokenizers.Tokenizer,
        eos_token_ids: frozenset[int],
        metrics: Metrics,
        tracing: Tracing = NO_TRACING,
        clock: Callable[[], float] = time.monotonic,
        reopened: Callable[[], None] | None = None,
    ) -> None:
        """`reopened`: a lost shard is waited for, this is called, and everybody goes on.

        None: a lost shard ends the loop.
        """
        self._session = session
        self._scheduler = session.scheduler
        self._reopened = reopened
        self._decoder = TextDecoder(tokenizer, eos_token_ids)
        self._writer = TextWriter(self._decoder, eos_token_ids, self._closed)
        self._metrics = metrics
        self._tracing = tracing
        # Of sampled requests only.
        self._traces: dict[int, SequenceTrace] = {}
        self._spans_dropped_by_shards = 0
        self._clock = clock
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

    def submit(self, request: ValidRequest, stream: GenerationStream) -> Callable[[], None]:
        """Queue one generation, whose events go to `stream`; the result cancels it."""
        if self._gone is not None:
            stream.fail(self._gone)
            return _nothing_to_cancel
        now = self._clock()
        sequence = self._scheduler.add(request, now)
        try:
            self._writer.open(sequence, stream)
        except BaseException:  # the library may panic over the prompt's ids
            self._scheduler.cancel(sequence.id)
            raise
        if trace.get_current_span().is_recording():
            ahead = self._scheduler.stats().waiting - 1
            self._traces[sequence.id] = SequenceTrace(self._tracing, sequence, now, ahead=ahead)
        self._wake.set()
        return partial(self._cancel, sequence.id)

    def _cancel(self, sequence_id: int) -> None:
        if self._writer.close(sequence_id):
            self._scheduler.cancel(sequence_id)
            if traced := self._traces.pop(sequence_id, None):
                traced.cancelled(self._clock())
            self._wake.set()

    async def run(self) -> None:
        """Serve until cancelled. Raises `ShardLost` when the step stream broke, unless it reopens.

        However it ends, every open request is told.
        """
        gone: KagamiError = GenerationFailed("the server is shutting down")
        try:
            while True:
                try:
                    await self._drive()
                except ShardLost as lost:
                    if self._reopened is None:
                        raise
                    await self._reopen(lost)
                    self._reopened()
        except ShardLost as lost:
            gone = lost
            raise
        except Exception:
            gone = GenerationFailed("internal error")
            raise
        finally:
            self._gone = gone
            self._writer.fail_all(gone)

    async def _drive(self) -> None:
        """Serve over one step stream until it breaks, which raises `ShardLost`.

        No task group: one loses a cancellation that comes while a task of it fails (Python 3.11).
        """
        try:
            async with self._session.open_steps(self._finish_step) as steps:
                self._steps = steps
                tasks = [
                    asyncio.ensure_future(self._send_when_woken()),
                    asyncio.ensure_future(steps.lost()),
                ]
                try:
                    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    for task in tasks:
                        task.cancel()
                    ends = await asyncio.gather(*tasks, return_exceptions=True)
                # The other one was cancelled.
                raise next(end for end in ends if isinstance(end, Exception))
        finally:
            self._steps = None

    async def _reopen(self, lost: ShardLost) -> None:
        """Wait for the shards; everybody is prefilled again from the log and goes on.

        Whatever was in flight is computed again. It gives the same tokens: greedy ones depend on
        the ids alone, sampled ones on their seed and position.
        """
        logger.error("Shard lost, waiting for it", extra={"error": str(lost)})
        lost_ranks = [rank for rank, is_up in enumerate(self._session.are_up()) if not is_up]
        now = self._clock()
        self._sent.clear()
        for traced in self._traces.values():
            traced.put_back(now)
        events = await self._session.reopen()
        self._scheduler = self._session.scheduler
        self._num_failed_steps = 0
        for rank in lost_ranks:
            self._metrics.shard_restarted(rank)
        self._deliver(self._writer.write(events, self._clock()))
        logger.info("Shards are there again", extra={"ranks": lost_ranks})

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
        outcomes = self._writer.write(events, now)
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
        num_tokens = self._deliver(outcomes)
        if not step.work:
            return
        report = StepReport(
            wall_s, updated - now, texts_made - updated, self._clock() - texts_made, num_tokens
        )
        self._metrics.step_finished(step, results, report)

    @staticmethod
    def _deliver(outcomes: list[Outcome]) -> int:
        """Put everything on its stream; how many tokens that were."""
        num_tokens = 0
        for stream, outcome in outcomes:
            if isinstance(outcome, StreamEvent):
                stream.put((outcome,))
                num_tokens += 1
            else:
                stream.fail(outcome)
        return num_tokens

    def _closed(self, sequence: Sequence, how: End | KagamiError) -> None:
        """A sequence has its last text, or cannot have more."""
        self._scheduler.finish(sequence)
        if traced := self._traces.pop(sequence.id, None):
            if isinstance(how, End):
                traced.finished(how, self._clock())
            else:
                traced.failed(str(how), self._clock())

    def _see_times(self, step: Step, results: StepResults, now: float) -> None:
        """Tell the traces of a step, and count the device's time for all who were in it."""
        if self._traces:
            failed = {failure.sequence_id for failure in results.failures}
            for work in step.work:
                traced = self._traces.get(work.sequence.id)
                if traced is not None and work.sequence.id not in failed:
                    traced.stepped(work, step, results, now)
        self._writer.see_step(step, results.device_ns)
        self._spans_dropped_by_shards = results.spans_dropped


def _nothing_to_cancel() -> None:
    """For a generation that never began."""
