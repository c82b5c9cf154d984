"""The gRPC service: messages become calls of the engine. No protobuf behind this file."""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterable
from concurrent.futures import Future, ThreadPoolExecutor

import grpc
import grpc.aio
import torch
from opentelemetry import trace

from kagami_proto import generate_pb2 as pb
from kagami_proto import generate_pb2_grpc
from kagami_proto.errors import InvalidCheckpoint, InvalidRequest, RankLost
from kagami_proto.panics import exception_of
from kagami_proto.span_names import Key, SpanName
from kagami_proto.tracing import NO_TRACING, context_of, span
from kagami_proto.wire import grammar_from_pb, sampling_from_pb, wanted_from_pb
from kagami_shard.engine.engine import Engine
from kagami_shard.engine.step import NewSequence, PromptLogprobs, Step, StepResult, WorkColumns
from kagami_shard.engine.warmup import WarmupLimits
from kagami_shard.engine.worker import Worker
from kagami_shard.forward.kv_cache import KVCache

logger = logging.getLogger(__name__)


class TextGenerationService(generate_pb2_grpc.TextGenerationServiceServicer):
    """The four calls of generate.proto on one engine."""

    def __init__(
        self,
        engine: Engine,
        worker: Worker,
        facts: pb.InfoResponse,
        tracer: trace.Tracer = NO_TRACING.tracer,
    ) -> None:
        self._tracer = tracer
        self._engine = engine
        self._worker = worker
        self._facts = facts
        self._stream: _Stream | None = None
        # A small and a large grammar at a time, which the router keeps apart.
        self._compiling = ThreadPoolExecutor(2, "compile grammars")

    async def Info(
        self,
        request: pb.InfoRequest,
        context: grpc.aio.ServicerContext[pb.InfoRequest, pb.InfoResponse],
    ) -> pb.InfoResponse:
        return self._facts

    async def Health(
        self,
        request: pb.HealthRequest,
        context: grpc.aio.ServicerContext[pb.HealthRequest, pb.HealthResponse],
    ) -> pb.HealthResponse:
        now = time.monotonic_ns()
        worker = self._worker
        busy_since = worker.busy_since_ns
        return pb.HealthResponse(
            last_step=worker.last_step,
            last_step_age_ns=now - worker.last_step_ns if worker.last_step else 0,
            busy=busy_since > 0,
            busy_ns=max(0, now - busy_since) if busy_since else 0,
        )

    async def Warmup(
        self,
        request: pb.WarmupRequest,
        context: grpc.aio.ServicerContext[pb.WarmupRequest, pb.WarmupResponse],
    ) -> pb.WarmupResponse:
        started = time.monotonic_ns()
        limits = WarmupLimits(
            max_step_tokens=request.max_step_tokens,
            max_batch_size=request.max_batch_size,
            max_total_tokens=request.max_total_tokens,
            max_pool_tokens=request.max_pool_tokens,
        )
        headers = {key: str(value) for key, value in context.invocation_metadata() or ()}
        caller = context_of(headers.get("traceparent", ""), headers.get("tracestate", ""))
        try:
            with span(
                self._tracer, SpanName.SHARD_WARMUP, context=caller, kind=trace.SpanKind.SERVER
            ) as opened:
                cache = await self._on_worker(limits)
                opened.set_attributes({Key.RANK: self._facts.rank, Key.KV_BLOCKS: cache.num_blocks})
        except torch.OutOfMemoryError as error:
            await context.abort(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"Not enough memory to handle {limits.max_step_tokens} prefill tokens. You need "
                f"to decrease `--max-batch-prefill-tokens`: {error}",
            )
        except InvalidCheckpoint as error:
            logger.error("Error when warming up the model: %s", error)
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
        return pb.WarmupResponse(
            num_blocks=cache.num_blocks,
            block_size=cache.block_size,
            kv_bytes=cache.num_bytes,
            elapsed_ns=time.monotonic_ns() - started,
            weight_bytes=self._engine.read_cost.weight_bytes,
            kv_token_bytes=self._engine.read_cost.kv_token_bytes,
            read_bandwidth=int(self._engine.read_cost.bandwidth),
        )

    async def CompileGrammar(
        self,
        request: pb.Grammar,
        context: grpc.aio.ServicerContext[pb.Grammar, pb.CompileGrammarResponse],
    ) -> pb.CompileGrammarResponse:
        started = time.monotonic_ns()
        try:
            await asyncio.get_running_loop().run_in_executor(
                self._compiling, self._engine.compile_grammar, grammar_from_pb(request)
            )
        except InvalidRequest as error:
            return pb.CompileGrammarResponse(error=str(error))
        return pb.CompileGrammarResponse(elapsed_ns=time.monotonic_ns() - started)

    async def _on_worker(self, limits: WarmupLimits) -> KVCache:
        future: Future[KVCache] = Future()

        def warm_up() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(self._engine.warmup(limits))
            # Handed to the caller, who knows what it means.
            except BaseException as raised:
                error = exception_of(raised)
                future.set_exception(error)
                if isinstance(error, RankLost):
                    raise

        self._worker.call(warm_up)
        return await asyncio.wrap_future(future)

    async def Run(  # type: ignore[override]  # a coroutine that writes, not a generator
        self,
        request_iterator: AsyncIterable[pb.Step],
        context: grpc.aio.ServicerContext[pb.Step, pb.StepResult],
    ) -> None:
        if self._engine.cache is None:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "Warmup comes before Run")
        stream = _Stream()
        if self._stream is not None:
            self._stream.supersede()
        self._stream = stream
        self._worker.call(self._worker.reset)
        async with asyncio.TaskGroup() as tasks:
            reader = tasks.create_task(self._read_steps(request_iterator, stream))
            while (result := await stream.results.get()) is not None:
                await context.write(result_to_pb(result, self._worker.traces.spans_dropped))
            reader.cancel()
        if stream.is_superseded:
            await context.abort(grpc.StatusCode.ABORTED, "another step stream was opened")

    async def _read_steps(self, steps: AsyncIterable[pb.Step], stream: "_Stream") -> None:
        async for message in steps:
            if stream.is_superseded:
                return
            self._worker.run(step_from_pb(message), stream.publish)
        # Queued after the last step: then the worker is done with this stream.
        self._worker.call(stream.end)


class _Stream:
    """One router's step stream: the results of the worker's thread, in order."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.results: asyncio.Queue[StepResult | None] = asyncio.Queue()
        self.is_superseded = False

    def supersede(self) -> None:
        """Another stream took over: steps and results of this one are ignored."""
        self.is_superseded = True
        self.results.put_nowait(None)

    def publish(self, result: StepResult) -> None:
        """Called on the worker's thread."""
        self._put(result)

    def end(self) -> None:
        """Called on the worker's thread, when the last step is done."""
        self._put(None)

    def _put(self, result: StepResult | None) -> None:
        # At shutdown the loop may be gone while a last step still ran.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self.results.put_nowait, result)


def step_from_pb(message: pb.Step) -> Step:
    """The wire's columns become the engine's records."""
    return Step(
        number=message.number,
        new_sequences=[_new_sequence(new) for new in message.new_sequences],
        drop_ids=message.drop_ids,
        work=WorkColumns(
            list(message.ids),
            list(message.positions),
            list(message.counts),
            wanted_from_pb(message.wanted),
        ),
        grants={grant.id: grant.blocks for grant in message.grants},
    )


def _new_sequence(new: pb.NewSequence) -> NewSequence:
    return NewSequence(
        id=new.id,
        token_ids=new.token_ids,
        num_prompt_tokens=new.num_prompt_tokens,
        sampling=sampling_from_pb(new.sampling),
        top_n_tokens=new.top_n_tokens,
        prompt_logprobs=new.prompt_logprobs,
        grammar=grammar_from_pb(new.grammar) if new.HasField("grammar") else None,
        traceparent=new.traceparent,
        tracestate=new.tracestate,
        decode_span_id=new.decode_span_id,
        refused=_refusal(new),
    )


def _refusal(new: pb.NewSequence) -> str:
    """Why this shard cannot serve what the message asks for; empty if it can."""
    if new.adapter_id:
        return f"this shard has no adapter {new.adapter_id!r}"
    return ""


def result_to_pb(result: StepResult, spans_dropped: int = 0) -> pb.StepResult:
    """The engine's records become the wire's columns."""
    return pb.StepResult(
        number=result.number,
        ids=result.ids,
        token_ids=result.token_ids,
        logprobs=result.logprobs,
        top_tokens=[
            pb.TopTokens(index=top.row, token_ids=top.token_ids, logprobs=top.logprobs)
            for top in result.top_tokens
        ],
        prompt_logprobs=[_prompt_logprobs_to_pb(entry) for entry in result.prompt_logprobs],
        failures=[
            pb.SequenceFailure(id=sequence_id, message=message)
            for sequence_id, message in result.failures.items()
        ],
        error=result.error,
        out_of_memory=result.out_of_memory,
        host_ns=result.host_ns,
        device_ns=result.device_ns,
        sampling_ns=result.sampling_ns,
        admission_ns=result.admission_ns,
        spans_dropped=spans_dropped,
    )


def _prompt_logprobs_to_pb(entry: PromptLogprobs) -> pb.PromptLogprobs:
    return pb.PromptLogprobs(
        id=entry.id,
        first_position=entry.first_position,
        logprobs=entry.logprobs,
        top_n=len(entry.top_ids[0]) if entry.top_ids else 0,
        top_token_ids=[token_id for row in entry.top_ids for token_id in row],
        top_logprobs=[logprob for row in entry.top_logprobs for logprob in row],
    )
