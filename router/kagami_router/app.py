"""The composition root: builds each object once, ties start to stop, and says how it ended.

bind HTTP (/health 503) -> load tokenizer -> wait for the shards -> warm up -> take work
-> serve until a signal -> take no new work -> drain -> exit 0
"""

import asyncio
import gc
import ipaddress
import logging
import signal
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import uvloop
from aiohttp import web
from opentelemetry.trace import SpanKind

from kagami_proto import logs
from kagami_proto.errors import GenerationFailed, ShardLost
from kagami_proto.open_tracing import open_tracing
from kagami_proto.span_names import Key, SpanName
from kagami_proto.tracing import NO_TRACING, Tracing, context_of, span
from kagami_proto.values import DevicePolicy
from kagami_router.api.routes import make_app, make_metrics_app
from kagami_router.api.schemas.native import Info
from kagami_router.api.web.app_state import TGI_VERSION, AppState, Readiness
from kagami_router.api.web.connections import Runner
from kagami_router.cli import RouterArgs, own_version
from kagami_router.request.validation import Limits, Validation
from kagami_router.scheduler.config import (
    DEFAULT_MAX_WAITING_TOKENS,
    DEFAULT_WAITING_SERVED_RATIO,
    SchedulerConfig,
)
from kagami_router.scheduler.scheduler import Scheduler
from kagami_router.serving.batching_loop import BatchingLoop
from kagami_router.serving.infer import Infer
from kagami_router.shards.client import ShardGroup
from kagami_router.shards.messages import Pool, ShardInfo
from kagami_router.telemetry.metrics import Capacity, Metrics
from kagami_router.text import chat_template, tokenizer
from kagami_router.tools.chat_format import ChatFormat
from kagami_router.tools.formats import find_format

logger = logging.getLogger(__name__)

# Objects that are alive before the collector looks for cycles. A step makes some thousand that all
# die with it; Python's 700 has it look at them several times a step, a tenth of a token's cost.
COLLECT_AFTER = 50_000
# Handlers that were ended by the deadline may still tell their clients.
LAST_WORDS_S = 2.0


class StartError(Exception):
    """The router cannot serve with these arguments, files or shards."""


def run(args: RouterArgs) -> int:
    """Serve until a signal or a failure; the process's exit code."""
    logs.configure("text_generation_router", level=args.log_level, json_output=args.json_output)
    gc.freeze()  # what was imported stays
    gc.set_threshold(COLLECT_AFTER, *gc.get_threshold()[1:])
    with (
        open_tracing(args.tracing, problem=args.tracing_problem) as tracing,
        asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
    ):
        return runner.run(_serve_until_signal(args, tracing))


async def _serve_until_signal(args: RouterArgs, tracing: Tracing) -> int:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    return await serve(args, stop, tracing)


async def serve(args: RouterArgs, stop: asyncio.Event, tracing: Tracing = NO_TRACING) -> int:
    """Serve until `stop` is set or something fails; the exit code."""
    for flag in args.without_effect:
        logger.warning("Flag has no effect", extra={"flag": flag})
    readiness = Readiness(Metrics())
    try:
        _check_arguments(args)
        async with _listening(args, readiness, tracing):
            return await _serve_behind(readiness, args, stop, tracing)
    except StartError as error:
        logger.error("%s", error)
        return 1


async def _serve_behind(
    readiness: Readiness, args: RouterArgs, stop: asyncio.Event, tracing: Tracing
) -> int:
    """Run the engine's side until it fails or `stop` is set."""
    engine = asyncio.ensure_future(_run_engine(args, readiness, tracing))
    signalled = asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait((engine, signalled), return_when=asyncio.FIRST_COMPLETED)
        if not engine.done():
            logger.info("signal received, starting graceful shutdown")
            infer = readiness.close()
            if infer is not None:
                await infer.drain(args.graceful_termination_timeout, LAST_WORDS_S)
            return 0
        engine.result()
        raise StartError("The batching loop ended")
    except ShardLost as error:
        logger.error("Shard lost: %s", error)
        return 1
    finally:
        signalled.cancel()
        engine.cancel()
        await asyncio.gather(engine, signalled, return_exceptions=True)


@asynccontextmanager
async def _listening(
    args: RouterArgs, readiness: Readiness, tracing: Tracing
) -> AsyncIterator[None]:
    """HTTP is bound inside; raises `StartError` where a port is taken."""
    app = make_app(
        readiness,
        payload_limit=args.payload_limit,
        allowed_origins=args.cors_allow_origin,
        key=args.api_key,
        aip_routes=(args.aip_predict_route, args.aip_health_route),
        tracing=tracing,
        traces_content=args.otlp_include_content,
    )
    host = _address(args.hostname)
    async with AsyncExitStack() as stack:
        await _bind(stack, app, host, args.port)
        if args.prometheus_port is not None and args.prometheus_port != args.port:
            metrics_app = make_metrics_app(readiness, args.cors_allow_origin)
            await _bind(stack, metrics_app, host, args.prometheus_port)
        yield


async def _bind(stack: AsyncExitStack, app: web.Application, host: str, port: int) -> None:
    runner = Runner(app, shutdown_timeout=LAST_WORDS_S)
    await runner.setup()
    stack.push_async_callback(runner.cleanup)
    try:
        await web.TCPSite(runner, host, port).start()
    except OSError as error:
        raise StartError(f"Failed to bind to addr: {host}:{port}: {error.strerror}") from error


def _address(hostname: str) -> str:
    try:
        ipaddress.ip_address(hostname)
    except ValueError:
        # Docker sets HOSTNAME to the container's id.
        logger.warning("Invalid hostname, defaulting to 0.0.0.0")
        return "0.0.0.0"
    return hostname


async def _run_engine(args: RouterArgs, readiness: Readiness, tracing: Tracing) -> None:
    """Connect, warm up, take work, and drive the batching loop; ends only by an error."""
    async with AsyncExitStack() as stack:
        start = span(
            tracing.tracer, SpanName.ROUTER_START, context=context_of(args.start_traceparent)
        )
        with start:
            loop, state = await _prepare(stack, args, tracing, readiness.metrics)
        readiness.open(state)
        logger.info("Connected")
        await loop.run()


async def _prepare(
    stack: AsyncExitStack, args: RouterArgs, tracing: Tracing, metrics: Metrics
) -> tuple[BatchingLoop, AppState]:
    """All that serving needs, warm; what has to be closed again is on `stack`."""
    threads = stack.enter_context(ThreadPoolExecutor(args.validation_workers, "tokenize"))
    folder = Path(args.tokenizer_name)
    try:
        with span(tracing.tracer, SpanName.ROUTER_LOAD_TOKENIZER):
            encoder = await asyncio.to_thread(tokenizer.load, folder, threads)
            given = Path(args.tokenizer_config_path) if args.tokenizer_config_path else None
            tokens = tokenizer.special_tokens(folder, given)
            template = chat_template.load(folder, tokens, given)
    except (OSError, ValueError) as error:
        raise StartError(str(error)) from error
    with span(tracing.tracer, SpanName.ROUTER_CONNECT) as opened:
        shards, facts = await _connect(stack, args.master_shard_uds_path, metrics)
        opened.set_attribute(Key.WORLD_SIZE, facts.world_size)
    logger.info("Warming up model")
    with span(tracing.tracer, SpanName.ROUTER_WARMUP, kind=SpanKind.CLIENT) as opened:
        pool = await _warm_up(shards, args)
        opened.set_attribute(Key.KV_BLOCKS, pool.num_blocks)
    pool_tokens = (pool.num_blocks - 1) * pool.block_size  # block 0 is scratch
    logger.info("Setting max batch total tokens to %d", pool_tokens)
    limits = plan_limits(
        args,
        max_positions=facts.max_positions,
        pool_tokens=pool_tokens,
        vocab_size=facts.vocab_size,
    )
    scheduler = Scheduler(_scheduler_config(args, pool, facts.policy))
    metrics.model_ready(
        Capacity(
            max_input_tokens=limits.max_input_tokens,
            max_total_tokens=limits.max_total_tokens,
            pool_tokens=pool_tokens,
            max_step_tokens=_max_step_tokens(args),
            max_batch_size=_max_batch_size(args),
            weight_bytes=pool.weight_bytes,
            kv_token_bytes=pool.kv_token_bytes,
            bandwidth=pool.bandwidth,
        ),
        scheduler.stats,
    )
    loop = BatchingLoop(
        shards,
        scheduler,
        tokenizer=encoder.backend,
        eos_token_ids=facts.eos_token_ids,
        metrics=metrics,
        tracing=tracing,
    )
    metrics.watch_spans(lambda: loop.spans_dropped)
    state = AppState(
        infer=Infer(loop, metrics, max_concurrent_requests=args.max_concurrent_requests),
        validation=Validation(
            encoder,
            limits,
            None if args.disable_grammar_support else shards.compile_grammar,
            tracer=tracing.tracer,
        ),
        tokenizer=encoder,
        chat_format=ChatFormat(template, find_format(template, encoder.backend), tracing.tracer),
        info=_info(args, limits, facts, pool_tokens),
        decoder=loop.decoder,
        compute_type=args.compute_type,
        is_healthy=lambda: loop.is_healthy,
    )
    return loop, state


async def _connect(
    stack: AsyncExitStack, master: str, metrics: Metrics
) -> tuple[ShardGroup, ShardInfo]:
    """All shards: the first tells how many there are, and they are numbered at their end."""
    shards = await stack.enter_async_context(ShardGroup([f"unix://{master}"]))
    metrics.watch_shards(shards.are_up)
    facts = await shards.wait_ready()
    if facts.world_size > 1:
        prefix = master.removesuffix("-0")
        addresses = [f"unix://{prefix}-{rank}" for rank in range(facts.world_size)]
        shards = await stack.enter_async_context(ShardGroup(addresses))
        metrics.watch_shards(shards.are_up)
        facts = await shards.wait_ready()
    return shards, facts


async def _warm_up(shards: ShardGroup, args: RouterArgs) -> Pool:
    try:
        return await shards.warmup(
            max_step_tokens=_max_step_tokens(args),
            max_batch_size=_max_batch_size(args),
            max_total_tokens=args.max_total_tokens or 0,
            max_pool_tokens=args.max_batch_total_tokens or 0,
        )
    except GenerationFailed as error:
        raise StartError(f"Unable to warmup the Python model shards: {error}") from error


def _max_batch_size(args: RouterArgs) -> int:
    return args.max_batch_size or args.max_concurrent_requests


def _max_step_tokens(args: RouterArgs) -> int:
    """Prompt tokens in one step; every running sequence must find room for its next token."""
    return max(args.max_batch_prefill_tokens, _max_batch_size(args))


def _scheduler_config(args: RouterArgs, pool: Pool, policy: DevicePolicy) -> SchedulerConfig:
    return SchedulerConfig(
        num_blocks=pool.num_blocks,
        block_size=pool.block_size,
        max_step_tokens=_max_step_tokens(args),
        max_batch_size=_max_batch_size(args),
        waiting_served_ratio=args.waiting_served_ratio,
        max_waiting_tokens=args.max_waiting_tokens,
        prefix_caching=args.prefix_caching,
        max_steps_in_flight=policy.steps_in_flight,
        cache_grows_to=cache_grows_to(args, pool.num_blocks, policy.cache_share),
    )


def cache_grows_to(args: RouterArgs, num_blocks: int, share: float) -> int | None:
    """Up to how many blocks of cached prefixes the pool's memory is taken for them; None: all.

    Where a block takes memory when it is first used, running sequences always may take it, and
    prefixes that may never come again up to `share`. A pool size that was given means all of it.
    """
    if share >= 1.0 or args.max_batch_total_tokens is not None:
        return None
    return int(num_blocks * share)


def _check_arguments(args: RouterArgs) -> None:
    """What can be known to be wrong before a shard is asked; TGI's texts."""
    given_input, given_total = args.max_input_tokens, args.max_total_tokens
    if given_input is not None and given_total is not None and given_input >= given_total:
        raise StartError("`max_input_tokens` must be < `max_total_tokens`")
    for name, value in (
        ("validation_workers", args.validation_workers),
        ("max_batch_size", args.max_batch_size),
        ("max_concurrent_requests", args.max_concurrent_requests),
        ("max_batch_prefill_tokens", args.max_batch_prefill_tokens),
    ):
        if value == 0:
            raise StartError(f"`{name}` must be > 0")


def plan_limits(
    args: RouterArgs, *, max_positions: int, pool_tokens: int, vocab_size: int
) -> Limits:
    """The lengths that are accepted: as given, else what model (0 = unknown) and pool can hold."""
    most = min(max_positions or pool_tokens, pool_tokens)
    max_total = most if args.max_total_tokens is None else args.max_total_tokens
    if max_total > pool_tokens:
        raise StartError(f"Not enough memory to handle `max_total_tokens={max_total}`")
    max_input = max_total - 1 if args.max_input_tokens is None else args.max_input_tokens
    if not 0 < max_input < max_total:
        raise StartError("`max_input_tokens` must be < `max_total_tokens`")
    if max_positions and max_total > max_positions:
        logger.warning(
            "`max_total_tokens` is beyond the model's positions",
            extra={"max_total_tokens": max_total, "max_positions": max_positions},
        )
    if args.max_input_tokens is None:
        logger.info("Maximum input tokens defaulted to %d", max_input)
    if args.max_total_tokens is None:
        logger.info("Maximum total tokens defaulted to %d", max_total)
    return Limits(
        max_best_of=args.max_best_of,
        max_stop_sequences=args.max_stop_sequences,
        max_top_n_tokens=args.max_top_n_tokens,
        max_input_tokens=max_input,
        max_total_tokens=max_total,
        max_client_batch_size=args.max_client_batch_size,
        vocab_size=vocab_size,
    )


def _info(args: RouterArgs, limits: Limits, facts: ShardInfo, pool_tokens: int) -> Info:
    return Info(
        model_id=args.served_model_name or args.tokenizer_name,
        model_sha=None,
        model_pipeline_tag=None,
        max_concurrent_requests=args.max_concurrent_requests,
        max_best_of=limits.max_best_of,
        max_stop_sequences=limits.max_stop_sequences,
        max_input_tokens=limits.max_input_tokens,
        max_total_tokens=limits.max_total_tokens,
        validation_workers=args.validation_workers,
        max_client_batch_size=limits.max_client_batch_size,
        router="text-generation-router",
        version=TGI_VERSION,
        sha=None,
        docker_label=args.docker_label,
        model_dtype=facts.dtype,
        model_device_type=facts.device_type,
        max_input_length=limits.max_input_tokens,
        waiting_served_ratio=DEFAULT_WAITING_SERVED_RATIO
        if args.waiting_served_ratio is None
        else args.waiting_served_ratio,
        max_batch_total_tokens=pool_tokens,
        max_waiting_tokens=DEFAULT_MAX_WAITING_TOKENS
        if args.max_waiting_tokens is None
        else args.max_waiting_tokens,
        max_batch_size=args.max_batch_size,
        kagami_version=own_version(),
        model_quantization=facts.quantization or None,
    )
