"""The launcher's life, top to bottom: check, prepare the weights, shards and router, wait, stop.

```
PARSE ─usage─► 2    CHECK ─refused─► 1    PREPARE ─no model─► 1    SHARDS ─one dies, too slow─► 1
ROUTER, beside them ─not found─► 1    RUN ─a child ends─► 1    a stop signal, anywhere ─► 0
```

Every way out stops the router before the shards: it needs all of them to finish running streams.
"""

import logging
import os
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack, closing

from opentelemetry.trace import Span, Tracer

from kagami_launcher import checks, cli, environment, plan, sockets
from kagami_launcher.child import Output
from kagami_launcher.cli import Invocation
from kagami_launcher.devices import DEVICE_VARIABLES, Devices, find_devices
from kagami_launcher.errors import LaunchFailed, Stopped
from kagami_launcher.health import probe_health
from kagami_launcher.model import hub_cache
from kagami_launcher.model import source as hub
from kagami_launcher.model.source import ModelSource
from kagami_launcher.notify import Notifier, own_settings
from kagami_launcher.plan import RouterPlan, ShardPlan
from kagami_launcher.prepare import prepare
from kagami_launcher.process_tree import LAUNCHER_TARGET, ProcessTree
from kagami_launcher.supervisor import Supervisor
from kagami_proto import logs
from kagami_proto.open_tracing import open_tracing
from kagami_proto.span_names import Key, SpanName
from kagami_proto.tracing import context_of, span

log = logging.getLogger(__name__)

_SHARD_LEVELS: Mapping[int, str] = {
    logging.DEBUG: "DEBUG",
    logging.INFO: "INFO",
    logging.WARNING: "WARNING",
}


def run(invocation: Invocation) -> int:
    """Run the tree until it ends; returns the exit code."""
    output = Output(sys.stdout.fileno())
    json_output = invocation.args.json_output
    logs.configure(
        LAUNCHER_TARGET, level=invocation.log_level, json_output=json_output, stream=output
    )
    wanted, problem = plan.trace_plan(invocation)
    with (
        open_tracing(wanted, problem=problem) as tracing,
        closing(Notifier(own_settings(invocation.environ))) as notifier,
        ExitStack() as held,
        Supervisor(output) as supervisor,
        supervisor.signals(),
    ):
        tree = ProcessTree(invocation, supervisor, notifier, tracing.tracer)
        try:
            with _start_span(invocation, tracing.tracer):
                devices, num_shard = _check(invocation)
                first = f"{plan.socket_prefix(invocation.args)}-0"
                held.callback(os.close, sockets.claim(first))
                source = prepare(invocation, tree, tracing.tracer)
                tree.start(*_plan_children(invocation, source, devices, num_shard))
            _watch(invocation, tree, supervisor, notifier)
        except LaunchFailed as failure:
            tree.stop()
            sys.stderr.write(f"Error: {failure}\n")
            return 1
        except Stopped:
            tree.stop()
        return 0


def _start_span(invocation: Invocation, tracer: Tracer) -> AbstractContextManager[Span]:
    """The span of the whole start; by its end the router serves."""
    environ, model_id = invocation.environ, invocation.args.model_id
    caller = context_of(environ.get("TRACEPARENT", ""), environ.get("TRACESTATE", ""))
    return span(tracer, SpanName.START, {Key.MODEL_ID: model_id}, context=caller)


def _check(invocation: Invocation) -> tuple[Devices, int]:
    """Say what was asked for, and refuse what cannot be done, before any work.

    Returns the devices that there are and the number of shards.
    """
    args, environ = invocation.args, invocation.environ
    if args.env:
        log.info(environment.report(environ))
    log.info(cli.dump(args))
    devices = find_devices(environ)
    if args.sharded and args.num_shard is None:
        log.info("Parsing num_shard from %s", "/".join(DEVICE_VARIABLES))
    num_shard = checks.check(args, devices)
    for line in checks.warnings(invocation, devices, num_shard):
        log.warning("%s", line)
    if problem := environment.port_problem(args.hostname, args.port):
        raise LaunchFailed("WebserverCannotStart", problem)
    if num_shard > 1:
        log.info("Sharding model on %s processes", num_shard)
        if problem := environment.port_problem(args.master_addr, args.master_port):
            raise LaunchFailed(
                "ShardCannotStart", f"{problem}: choose another --master-port for the shards"
            )
    return devices, num_shard


def _plan_children(
    invocation: Invocation, source: ModelSource, devices: Devices, num_shard: int
) -> tuple[list[ShardPlan], RouterPlan]:
    """Decide every child's command line."""
    try:
        config = hub.read_config(source.folder)
    except hub_cache.ModelNotFound as missing:
        raise LaunchFailed("DownloadError", str(missing)) from missing
    args = invocation.args
    prefill_tokens = plan.max_batch_prefill_tokens(args, devices, hub.max_positions(config))
    if args.max_batch_prefill_tokens is None:
        log.info("Default `max_batch_prefill_tokens` to %s", prefill_tokens)
    level = logs.level_of(invocation.log_level, LAUNCHER_TARGET)
    shards = [
        plan.plan_shard(
            invocation,
            source,
            log_level=_SHARD_LEVELS.get(level, "ERROR"),
            rank=rank,
            num_shard=num_shard,
        )
        for rank in range(num_shard)
    ]
    router = plan.plan_router(
        invocation, source, devices, prefill_tokens=prefill_tokens, num_shard=num_shard
    )
    return shards, router


def _watch(
    invocation: Invocation, tree: ProcessTree, supervisor: Supervisor, notifier: Notifier
) -> None:
    """Wait until a child ends or a signal comes: one of the two is raised.

    Meanwhile the service manager hears whether the model makes progress.
    """
    address = invocation.args.hostname
    # Where the router can be asked from here.
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address, address)
    was_alive = True
    notifier.serving("Serving", is_ready=True)
    while True:
        tree.raise_if_over(supervisor.next_event(notifier.wait_s))
        if not notifier.is_due:
            continue
        is_alive, status = probe_health(host, invocation.args.port, tree.sockets)
        if was_alive and not is_alive:
            log.warning("The service manager is not told that all is well: %s", status)
        notifier.serving(status, is_alive=is_alive)
        was_alive = is_alive
