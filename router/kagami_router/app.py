"""The life of the process: ties start to stop, and says how it ended. `assembly.py` builds.

bind HTTP (/health 503) -> load tokenizer -> wait for the shards -> warm up -> take work
-> serve until a signal -> take no new work -> drain -> exit 0
"""

import asyncio
import errno
import gc
import logging
import signal
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import uvloop
from aiohttp import web

from kagami_proto import logs
from kagami_proto.errors import ShardLost
from kagami_proto.open_tracing import open_tracing
from kagami_proto.span_names import SpanName
from kagami_proto.tracing import NO_TRACING, Tracing, context_of, span
from kagami_router.api.routes import make_app, make_metrics_app
from kagami_router.api.web.app_state import Readiness
from kagami_router.api.web.connections import Runner
from kagami_router.api.web.time_limits import TimeLimits
from kagami_router.assembly import StartError, assemble, check_arguments
from kagami_router.cli import RouterArgs
from kagami_router.telemetry.metrics import Metrics

logger = logging.getLogger(__name__)

# Objects that are alive before the collector looks for cycles. A step makes some thousand that all
# die with it; Python's 700 has it look at them several times a step, a tenth of a token's cost.
COLLECT_AFTER = 50_000
# Connections that wait to be accepted; the kernel drops what comes beyond them.
BACKLOG = 1024
# Handlers that were ended by the deadline may still tell their clients.
LAST_WORDS_S = 2.0


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
        check_arguments(args)
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
        caller_header=args.caller_header,
        allowed_origins=args.cors_allow_origin,
        key=args.api_key,
        aip_routes=(args.aip_predict_route, args.aip_health_route),
        tracing=tracing,
        traces_content=args.otlp_include_content,
    )
    limits = TimeLimits(
        head_s=args.header_timeout,
        body_s=args.body_timeout,
        idle_s=args.keep_alive_timeout,
        answer_s=args.write_timeout,
    )
    host = args.hostname
    async with AsyncExitStack() as stack:
        await _bind(
            stack, Runner(app, shutdown_timeout=LAST_WORDS_S, limits=limits), host, args.port
        )
        if args.prometheus_port is not None and args.prometheus_port != args.port:
            metrics_app = make_metrics_app(readiness, args.cors_allow_origin)
            runner = Runner(metrics_app, shutdown_timeout=LAST_WORDS_S, limits=limits)
            await _bind(stack, runner, host, args.prometheus_port)
        yield


async def _bind(stack: AsyncExitStack, runner: Runner, host: str, port: int) -> None:
    """Listen on all addresses of `host` that this machine has."""
    await runner.setup()
    stack.push_async_callback(runner.cleanup)
    problem: Exception | None = None
    try:
        for address in await _addresses(host, port):
            try:
                await web.TCPSite(runner, address, port, backlog=BACKLOG).start()
            except OSError as error:
                if error.errno != errno.EADDRNOTAVAIL:  # as ::1 of "localhost", where IPv6 is off
                    raise
                problem = error
        if problem is not None and not runner.sites:
            raise problem
    except (OSError, UnicodeError) as error:  # Unicode: a name that DNS cannot even write
        reason = error.strerror if isinstance(error, OSError) else error
        raise StartError(f"Failed to bind to addr: {host}:{port}: {reason}") from error


async def _addresses(host: str, port: int) -> list[str]:
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


async def _run_engine(args: RouterArgs, readiness: Readiness, tracing: Tracing) -> None:
    """Connect, warm up, take work, and drive the batching loop; ends only by an error."""
    async with AsyncExitStack() as stack:
        start = span(
            tracing.tracer, SpanName.ROUTER_START, context=context_of(args.start_traceparent)
        )
        with start:
            loop, state = await assemble(stack, args, tracing, readiness.metrics)
        readiness.open(state)
        logger.info("Connected")
        await loop.run()
