"""Build the engine, bind the socket, wait for a signal, stop."""

import asyncio
import gc
import logging
import os
import signal
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import grpc.aio
import torch
import uvloop

from kagami_proto import generate_pb2 as pb
from kagami_proto import local_channel
from kagami_proto.errors import KagamiError, RankLost
from kagami_proto.generate_pb2_grpc import add_TextGenerationServiceServicer_to_server
from kagami_proto.open_tracing import open_tracing
from kagami_proto.panics import exception_of
from kagami_proto.span_names import Key, SpanName
from kagami_proto.tracing import context_of, span
from kagami_proto.wire import policy_to_pb
from kagami_shard.backends.base import Backend
from kagami_shard.backends.native.select import LateBuild, Native
from kagami_shard.backends.select import load_backend
from kagami_shard.cli import ServeArgs
from kagami_shard.engine.engine import Engine
from kagami_shard.engine.traces import SequenceTraces
from kagami_shard.engine.worker import Worker
from kagami_shard.machine import cgroup
from kagami_shard.machine.bandwidth import read_bandwidth
from kagami_shard.machine.device import device_kind, find_device
from kagami_shard.machine.distributed import connect
from kagami_shard.machine.memory import is_out_of_memory
from kagami_shard.models.eos import eos_token_ids
from kagami_shard.sampling.grammar import Grammars
from kagami_shard.sampling.watermark import Watermark
from kagami_shard.service import TextGenerationService
from kagami_shard.weights.finite import why_not_finite

logger = logging.getLogger(__name__)

# Time for a step that still runs at SIGTERM; the router has drained before.
_GRACE_S = 2.0
# Objects that outlive their step are those of a sequence.
_COLLECT_AFTER = 50_000
_MAX_REASON = 1000


def serve(args: ServeArgs) -> int:
    """Load, then serve until SIGTERM or SIGINT; the exit code.

    Until the model is loaded a signal ends the process by its default action, at once.
    """
    with (
        open_tracing(args.tracing, problem=args.tracing_problem) as tracing,
        ThreadPoolExecutor(1, "engine") as thread,
    ):
        try:
            with span(
                tracing.tracer,
                SpanName.SHARD_LOAD,
                {Key.RANK: args.rank, Key.WORLD_SIZE: args.world_size},
                context=context_of(args.start_traceparent),
            ):
                engine, facts, late_build = thread.submit(_load, args).result()
        # The border of the process: its last log line says what stopped the load.
        except BaseException as raised:
            error = exception_of(raised)
            if is_out_of_memory(error):
                logger.error("Error when initializing model: not enough memory: %s", error)
            else:
                logger.error("Error when initializing model: %s", _reason(error))
                logger.debug("Where the load failed", exc_info=error)
            return 1
        # Objects made by the imports and the model stay, so no collection needs to look at them
        # again (measured: 3 % of a native step's time). A step's own objects die with the step.
        gc.collect()
        gc.freeze()
        gc.set_threshold(_COLLECT_AFTER, *gc.get_threshold()[1:])
        socket = Path(f"{args.uds_path}-{args.rank}").absolute()
        overlap = facts.policy.steps_in_flight > 1 and args.world_size == 1
        traces = SequenceTraces(tracing, rank=args.rank, has_step_spans=args.otlp_step_spans)
        with Worker(engine, thread, overlap=overlap, traces=traces) as worker:
            if late_build is not None:
                late_build.start(lambda: worker.call(engine.upgrade))
            service = TextGenerationService(engine, worker, facts, tracing.tracer)
            try:
                with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                    code = runner.run(_serve(socket, service, worker))
            except OSError as error:
                logger.error("Cannot listen on %s: %s", socket, error)
                return 1
            if args.world_size > 1:
                worker.stop()
                if wait((worker.ended,), timeout=_GRACE_S).not_done:
                    logger.warning("A step was not finished: it waits for a rank that is gone")
                tracing.close()
                _end_now(socket, code)
    socket.unlink(missing_ok=True)
    return code


def _reason(error: Exception) -> str:
    """In one line. What a model folder can cause is a `KagamiError`, or the system's; of anything
    else the place in the code is said too.
    """
    text = " ".join(str(error).split())[:_MAX_REASON]
    if isinstance(error, KagamiError | OSError) or error.__traceback__ is None:
        return text
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {text} ({Path(place.filename).name}:{place.lineno})"


def default_threads(world_size: int) -> int:
    """A thread for each core that the process may use; ranks share those of one machine.

    They meet many times in a step: with more threads than cores, all wait for one without a core
    (measured: SmolLM2 on two cores, a decode of 21 ms with two threads, 86 with 8, 683 with 64).
    """
    return max(1, min(torch.get_num_threads(), cgroup.num_cores() or sys.maxsize) // world_size)


def _end_now(socket: Path, code: int) -> NoReturn:
    """End this process, a rank of several, without waiting for ranks that may be gone.

    A step may hang in a collective that another rank never called, and so may the end of a group.
    The router notices the end of its stream by the socket.
    """
    socket.unlink(missing_ok=True)
    logging.shutdown()
    os._exit(code)


def _load(args: ServeArgs) -> tuple[Engine, pb.InfoResponse, LateBuild | None]:
    started = time.monotonic()
    torch.set_num_threads(args.num_threads or default_threads(args.world_size))
    device = find_device(args.rank)
    parallel = connect(
        args.rank,
        args.world_size,
        address=args.master_addr,
        port=args.master_port,
        device=device,
    )
    dtype: torch.dtype = getattr(torch, args.dtype)
    reading = time.monotonic()
    backend, late_build = load_backend(
        args.model_folder,
        dtype=dtype,
        device=device,
        trust_remote_code=args.trust_remote_code,
        max_length=args.max_total_tokens,
        parallel=parallel,
        quantize=args.quantize,
        memory_fraction=args.memory_fraction,
        native=Native(args.cache_folder, torch.get_num_threads()) if args.native else None,
    )
    model = backend.model
    engine = Engine(
        backend,
        block_size=args.block_size,
        parallel=parallel,
        grammars=Grammars(
            args.model_folder,
            vocab_size=model.vocab_size,
            eos_token_ids=eos_token_ids(args.model_folder),
        ),
        watermark=Watermark(args.watermark_gamma, args.watermark_delta),
        probe=read_bandwidth,
        why_not_finite=lambda: why_not_finite(args.model_folder, dtype),
    )
    reading_s = time.monotonic() - reading
    logger.info(
        "Model loaded",
        extra={
            "model_type": model.model_type,
            "dtype": args.dtype,
            "quantization": model.quantization or "none",
            "device": str(device),
            "attention": backend.name,
            "seconds": round(time.monotonic() - started, 2),
            "gigabytes": round(model.bytes_loaded / 1e9, 3),
            "gigabytes_per_second": round(model.bytes_loaded / 1e9 / reading_s, 2),
        },
    )
    return engine, _facts(args, backend), late_build


def _facts(args: ServeArgs, backend: Backend) -> pb.InfoResponse:
    """What `Info` answers."""
    model = backend.model
    return pb.InfoResponse(
        model_type=model.model_type,
        dtype=f"torch.{args.dtype}",
        device_type=device_kind(backend.device),
        attention=backend.name,
        vocab_size=model.vocab_size,
        max_positions=model.max_positions,
        block_size=args.block_size,
        eos_token_ids=eos_token_ids(args.model_folder),
        rank=args.rank,
        world_size=args.world_size,
        version=args.version,
        quantization=model.quantization,
        policy=policy_to_pb(backend.policy),
    )


async def _serve(socket: Path, service: TextGenerationService, worker: Worker) -> int:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)

    def wake_up(_: object) -> None:
        with suppress(RuntimeError):  # the event loop ended first: that is the usual order
            loop.call_soon_threadsafe(stop.set)

    worker.ended.add_done_callback(wake_up)
    server = grpc.aio.server(options=local_channel.OPTIONS)
    add_TextGenerationServiceServicer_to_server(service, server)
    try:
        server.add_insecure_port(f"unix:{socket}")
    except RuntimeError as error:
        raise OSError(str(error)) from error
    await server.start()
    logger.info("Server started at unix://%s", socket)
    await stop.wait()
    if worker.ended.done() and isinstance(reason := worker.ended.exception(), RankLost):
        logger.error("The engine stopped: %s", reason)
        _end_now(socket, 1)
    await server.stop(_GRACE_S)
    if worker.ended.done() and (reason := worker.ended.exception()):
        logger.error("The engine stopped: %s", reason, exc_info=reason)
        return 1
    return 0
