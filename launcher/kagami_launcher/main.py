"""The launcher's life, top to bottom: check, prepare the weights, shards and router, wait, stop.

```
PARSE ─usage─► 2    CHECK ─refused─► 1    PREPARE ─no model─► 1    SHARDS ─one dies, too slow─► 1
ROUTER, beside them ─not found─► 1    RUN ─a child ends─► 1    a stop signal, anywhere ─► 0
```

Every way out stops the router before the shards: it needs all of them to finish running streams.
"""

import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing
from functools import partial
from pathlib import Path

from opentelemetry.context import get_current
from opentelemetry.trace import Span, Tracer, get_current_span

from kagami_launcher import cli, environment, plan, pulse, sockets
from kagami_launcher.cli import Invocation
from kagami_launcher.model import hub_cache
from kagami_launcher.model import source as hub
from kagami_launcher.model.source import ModelSource
from kagami_launcher.notify import Notifier, NotifySettings, own_settings
from kagami_launcher.plan import Devices, LaunchFailed, RouterPlan, ShardPlan
from kagami_launcher.supervisor import (
    Child,
    ChildEnded,
    HeldOutput,
    Output,
    StopAsked,
    Supervisor,
    Voice,
    describe_end,
    last_words,
)
from kagami_proto import logs
from kagami_proto.health import is_healthy
from kagami_proto.open_tracing import open_tracing
from kagami_proto.span_names import Key, SpanName
from kagami_proto.tracing import NO_TRACING, context_of, headers_of, span

log = logging.getLogger(__name__)

TARGET = "text_generation_launcher"
_ROUTER_TARGET = "text_generation_router"
_SHARD_LEVELS: Mapping[int, str] = {
    logging.DEBUG: "DEBUG",
    logging.INFO: "INFO",
    logging.WARNING: "WARNING",
}
_DOWNLOAD: Mapping[str, object] = {"span": "download"}
_POLL_S, _PROBE_TIMEOUT_S, _WAITING_EVERY_S = 0.1, 1.0, 10.0
# Nobody is being served yet, so there is nothing to finish: router and shard together end in 5 s.
_STARTUP_GRACE_S = 2.0
# Without one of its shards a model finishes nothing: what is left may say so, and hang no longer.
_BROKEN_GRACE_S = 5.0
# A router that lost its shard may be gone before it: the shard's own end follows within this time.
_SHARD_ENDS_WITHIN_S = 1.0


class Stopped(Exception):
    """A stop signal came while something was being started."""


def run(invocation: Invocation) -> int:
    """Run the tree until it ends; returns the exit code."""
    output = Output(sys.stdout.fileno())
    json_output = invocation.args.json_output
    logs.configure(TARGET, level=invocation.log_level, json_output=json_output, stream=output)
    wanted, problem = plan.trace_plan(invocation)
    with (
        open_tracing(wanted, problem=problem) as tracing,
        closing(Notifier(own_settings(invocation.environ))) as notifier,
        ExitStack() as held,
        Supervisor(output) as supervisor,
        supervisor.signals(),
    ):
        launch = Launch(invocation, supervisor, tracing.tracer, notifier)
        try:
            with launch.tracing_start():
                launch.check()
                held.callback(os.close, sockets.claim(f"{plan.socket_prefix(invocation.args)}-0"))
                source = launch.prepare()
                shard_plans, router_plan = launch.plan(source)
                launch.start_children(shard_plans, router_plan)
            launch.watch()
        except LaunchFailed as failure:
            launch.stop()
            sys.stderr.write(f"Error: {failure}\n")
            return 1
        except Stopped:
            launch.stop()
        return 0


class Launch:
    """One run: what has been started so far, and how it goes on from there."""

    def __init__(
        self,
        invocation: Invocation,
        supervisor: Supervisor,
        tracer: Tracer = NO_TRACING.tracer,
        notifier: Notifier | None = None,
    ) -> None:
        self._invocation = invocation
        self._notifier = notifier or Notifier(NotifySettings())
        self._doing = "Starting"
        self._sockets: list[str] = []
        self._tracer = tracer
        self._supervisor = supervisor
        self._downloader: Child | None = None
        self._converter: Child | None = None
        self._shards: list[Child] = []  # by rank
        self._router: Child | None = None
        self._router_output: HeldOutput | None = None
        self._devices = Devices(0)
        self._num_shard = 1

    def tracing_start(self) -> AbstractContextManager[Span]:
        """The span of the whole start; by its end the router serves."""
        environ, args = self._invocation.environ, self._invocation.args
        caller = context_of(environ.get("TRACEPARENT", ""), environ.get("TRACESTATE", ""))
        return span(self._tracer, SpanName.START, {Key.MODEL_ID: args.model_id}, context=caller)

    def check(self) -> None:
        """Say what was asked for, and refuse what cannot be done, before any work."""
        args, environ = self._invocation.args, self._invocation.environ
        if args.env:
            log.info("%s", environment.report(environ))
        log.info("%s", cli.dump(args))
        self._devices = environment.find_devices(environ)
        if args.sharded and args.num_shard is None:
            log.info("Parsing num_shard from %s", "/".join(environment.DEVICE_VARIABLES))
        self._num_shard = plan.check(args, self._devices)
        for line in plan.warnings(self._invocation, self._devices, self._num_shard):
            log.warning("%s", line)
        address = cli.listen_address(args.hostname)
        if problem := environment.port_problem(address, args.port):
            raise LaunchFailed("WebserverCannotStart", problem)
        if self._num_shard > 1:
            log.info("Sharding model on %s processes", self._num_shard)
            if problem := environment.port_problem(args.master_addr, args.master_port):
                raise LaunchFailed(
                    "ShardCannotStart", f"{problem}: choose another --master-port for the shards"
                )

    def prepare(self) -> ModelSource:
        """Find the model's folder, and make it if it has to be converted."""
        args, environ = self._invocation.args, self._invocation.environ
        log.info("Starting check and download process for %s", args.model_id, extra=_DOWNLOAD)
        cache = hub_cache.cache_folder(args.huggingface_hub_cache, environ)
        override, was_looked_up = args.weights_cache_override, False
        try:
            if not hub.is_hub_id(args.model_id) or not override:
                was_looked_up = self._download(cache)
                source = hub.resolve(args.model_id, revision=args.revision, cache=cache)
            else:
                source = hub.overridden(args.model_id, Path(override), cache)
        except hub_cache.ModelNotFound as missing:
            raise LaunchFailed("DownloadError", str(missing)) from missing
        if args.revision is not None and not source.is_from_hub:
            log.warning("`--revision` has no effect: %s is not from the hub", args.model_id)
        if source.is_ready and not was_looked_up:
            log.info("Files are already present on the host. Skipping download.")
        elif not source.is_ready:
            self._convert(source)
        log.info("Successfully downloaded weights for %s", args.model_id, extra=_DOWNLOAD)
        return source

    def _download(self, cache: Path) -> bool:
        """Have the hub's model brought into the cache; False if nobody has to be asked for it."""
        args, environ = self._invocation.args, self._invocation.environ
        if not hub.is_hub_id(args.model_id):
            return False
        if hub_cache.will_do(
            args.model_id,
            args.revision,
            cache,
            is_offline=hub_cache.is_offline(environ),
            trust_remote_code=args.trust_remote_code,
        ):
            return False
        self._say(f"Downloading {args.model_id}")
        with span(self._tracer, SpanName.DOWNLOAD):
            self._downloader = self._supervisor.start(
                "download",
                plan.download_command(args, on_terminal=sys.stdout.isatty()),
                environment.for_download(environ, plan.hub_environment(args)),
                self._voice(TARGET, renames=True),
            )
            self._await_success(self._downloader)
        return True

    def _convert(self, source: ModelSource) -> None:
        log.info("Converting %s to safetensors in %s", source.origin, source.folder)
        self._say(f"Converting {self._invocation.args.model_id}")
        with span(self._tracer, SpanName.CONVERT):
            self._converter = self._supervisor.start(
                "download",
                [sys.executable, "-P", "-m", *plan.conversion(self._invocation, source)],
                environment.for_conversion(self._invocation.environ),
                self._voice(TARGET, renames=True),
            )
            self._await_success(self._converter)

    def _await_success(self, child: Child) -> None:
        self._await_end(child)
        if child.exit_code:
            if child.exit_code < 0:
                log.error("Download process %s", describe_end(child))
            raise LaunchFailed("DownloadError", child.last_error)

    def plan(self, source: ModelSource) -> tuple[list[ShardPlan], RouterPlan]:
        """Decide every child's command line."""
        try:
            config = hub.read_config(source.folder)
        except hub_cache.ModelNotFound as missing:
            raise LaunchFailed("DownloadError", str(missing)) from missing
        args = self._invocation.args
        positions = hub.max_positions(config)
        prefill_tokens = plan.max_batch_prefill_tokens(args, self._devices, positions)
        if args.max_batch_prefill_tokens is None:
            log.info("Default `max_batch_prefill_tokens` to %s", prefill_tokens)
        level = logs.level_of(self._invocation.log_level, TARGET)
        return (
            [
                plan.plan_shard(
                    self._invocation,
                    source,
                    log_level=_SHARD_LEVELS.get(level, "ERROR"),
                    rank=rank,
                    num_shard=self._num_shard,
                )
                for rank in range(self._num_shard)
            ],
            plan.plan_router(
                self._invocation,
                source,
                self._devices,
                prefill_tokens=prefill_tokens,
                num_shard=self._num_shard,
            ),
        )

    def start_children(self, shards: Sequence[ShardPlan], router: RouterPlan) -> None:
        """Start all shards and the router at once; wait until every one's `Health` answers, then
        until the router serves, which says `Connected` itself.

        The router's imports take half a second that its shards take longer; it waits for them
        itself. What it says is held back until then: its lines come after the shards' as ever.
        """
        self._say(f"Loading {self._invocation.args.model_id}")
        self._sockets = [shard.socket for shard in shards]
        around = get_current()
        with span(self._tracer, SpanName.START_ROUTER):
            of_router = _trace_context()
            attributes = {Key.WORLD_SIZE: len(shards)}
            with span(self._tracer, SpanName.START_SHARDS, attributes, context=around):
                self._start_shards(shards, partial(self._start_router, router, of_router))
            self._say("Warming up")
            self._hear_router()
            self._await_router()

    def _start_shards(self, shards: Sequence[ShardPlan], meanwhile: Callable[[], None]) -> None:
        started = time.monotonic_ns()
        for shard in shards:
            self._start_shard(shard)
        meanwhile()
        waiting = list(shards)
        limit_s = self._invocation.startup_timeout_s
        next_word_s = _WAITING_EVERY_S
        while True:
            for shard in [shard for shard in waiting if self._is_ready(shard)]:
                duration = _duration(time.monotonic_ns() - started)
                log.info("Shard ready in %s", duration, extra=_about(shard))
                waiting.remove(shard)
            if not waiting:
                return
            self._raise_if_over(self._supervisor.next_event(_POLL_S))
            self._say_again()
            waited_s = (time.monotonic_ns() - started) / 1e9
            if waited_s >= next_word_s:
                for shard in waiting:
                    log.info("Waiting for shard to be ready...", extra=_about(shard))
                next_word_s += _WAITING_EVERY_S
            if waited_s >= limit_s:
                log.error("Shard %s is not ready after %s s", waiting[0].rank, limit_s)
                raise LaunchFailed("ShardCannotStart")

    def _start_shard(self, shard: ShardPlan) -> None:
        command = self._command(shard.argv, "ShardCannotStart")
        sockets.clear(shard.socket)
        log.info("Starting shard", extra=_about(shard))
        env = environment.for_shard(
            self._invocation.environ, {**shard.environment, **_trace_context()}
        )
        voice = self._voice(TARGET, rank=shard.rank, renames=True)
        self._shards.append(self._start("shard", command, env, voice, "ShardCannotStart"))

    @staticmethod
    def _is_ready(shard: ShardPlan) -> bool:
        return Path(shard.socket).exists() and is_healthy(
            f"unix://{shard.socket}", _PROBE_TIMEOUT_S
        )

    def _start_router(self, router: RouterPlan, trace_context: Mapping[str, str]) -> None:
        command = self._command(router.argv, "WebserverCannotStart")
        env = environment.for_router(
            self._invocation.environ, {**router.environment, **trace_context}
        )
        voice = self._voice(_ROUTER_TARGET)
        output = self._router_output = self._supervisor.held_output()
        self._router = self._start("webserver", command, env, voice, "WebserverCannotStart", output)

    def _hear_router(self) -> None:
        if self._router_output is not None and self._router_output.is_held:
            log.info("Starting Webserver")
            self._router_output.release()

    def _await_router(self) -> None:
        while self._router is not None and not self._router.has_connected:
            self._raise_if_over(self._supervisor.next_event(_POLL_S))
            self._say_again()

    def watch(self) -> None:
        """Wait until a child ends or a signal comes: one of the two is raised.

        Meanwhile the service manager hears whether the model makes progress.
        """
        was_alive = True
        self._notifier.serving("Serving", is_ready=True)
        while True:
            self._raise_if_over(self._supervisor.next_event(self._notifier.wait_s))
            if not self._notifier.is_due:
                continue
            is_alive, status = pulse.feel(self._own_host, self._invocation.args.port, self._sockets)
            if was_alive and not is_alive:
                log.warning("The service manager is not told that all is well: %s", status)
            self._notifier.serving(status, is_alive=is_alive)
            was_alive = is_alive

    @property
    def _is_unheard(self) -> bool:
        """Whether shards are still loading: until they have, the router is not spoken of."""
        return self._router_output is None or self._router_output.is_held

    @property
    def _own_host(self) -> str:
        """Where the router can be asked from here."""
        address = cli.listen_address(self._invocation.args.hostname)
        return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address, address)

    def _say(self, what: str) -> None:
        """Tell the service manager what the start is at."""
        self._doing = what
        self._notifier.starting(what)

    def _say_again(self) -> None:
        """Before its patience ends."""
        if self._notifier.is_due:
            self._notifier.starting(self._doing)

    def stop(self) -> None:
        """End whatever runs: the router first, with time to finish its streams, then all shards."""
        self._notifier.stopping()
        is_serving = self._router is not None and self._router.has_connected
        full_s = float(self._invocation.args.graceful_termination_timeout)
        is_broken = any(not (shard.is_running or shard.was_asked_to_end) for shard in self._shards)
        most_s = _BROKEN_GRACE_S if is_broken else full_s
        grace_s = min(full_s, most_s if is_serving else _STARTUP_GRACE_S)
        for child in (self._downloader, self._converter):
            if child:
                self._supervisor.stop([child], grace_s)
        if self._router and self._is_unheard:  # it has served nobody, and nobody knows of it
            self._router.was_asked_to_end = True
            self._router.signal_group(signal.SIGKILL)
        elif self._router:
            self._supervisor.stop([self._router], grace_s)
        if self._shards:
            log.info("Shutting down shards")
            self._supervisor.stop(self._shards, grace_s)
        for child in (self._router, *self._shards):
            if child and child.exit_code and not child.was_asked_to_end and last_words(child):
                log.error("Last error of the %s: %s", child.name, last_words(child))

    def _await_end(self, child: Child) -> None:
        while child.is_running:
            if isinstance(self._supervisor.next_event(self._notifier.wait_s), StopAsked):
                raise Stopped
            self._say_again()

    def _raise_if_over(self, event: ChildEnded | StopAsked | None) -> None:
        match event:
            case StopAsked():
                raise Stopped
            case ChildEnded(child) if child is self._router:
                self._raise_if_over(self._supervisor.next_event(_SHARD_ENDS_WITHIN_S))
                self._hear_router()
                log.error("Webserver Crashed")
                raise LaunchFailed("WebserverFailed")
            case ChildEnded(child) if child in self._shards:
                rank = self._shards.index(child)
                if child.exit_code is not None and child.exit_code < 0:
                    log.error("Shard process %s", describe_end(child), extra={"rank": rank})
                is_loading = self._is_unheard
                log.error("Shard %s %s", rank, "failed to start" if is_loading else "crashed")
                raise LaunchFailed("ShardCannotStart" if is_loading else "ShardFailed")
            case _:
                pass

    def _command(self, argv: tuple[str, ...], variant: str) -> list[str]:
        path = environment.find_command(argv[0], self._invocation.environ)
        if path is None:
            log.error("%s not found in PATH", argv[0])
            log.error("Please install it with `make install`")
            raise LaunchFailed(variant)
        return [path, *argv[1:]]

    def _start(
        self,
        name: str,
        argv: list[str],
        env: Mapping[str, str],
        voice: Voice,
        variant: str,
        output: HeldOutput | None = None,
    ) -> Child:
        try:
            return self._supervisor.start(name, argv, env, voice, output)
        except OSError as error:
            raise LaunchFailed(variant, f"cannot start {argv[0]}: {error.strerror}") from error

    def _voice(self, target: str, rank: int | None = None, renames: bool = False) -> Voice:
        level = logs.level_of(self._invocation.log_level, target)
        return Voice(target, level, self._invocation.args.json_output, rank, renames)


def _trace_context() -> dict[str, str]:
    """The current span for a child, in the variables that OpenTelemetry names for it."""
    context = get_current_span().get_span_context()
    return {name.upper(): value for name, value in headers_of(context).items()}


def _about(shard: ShardPlan) -> dict[str, object]:
    return {"span": "shard-manager", "rank": shard.rank}


def _duration(nanoseconds: int) -> str:
    """A time as Rust's Debug prints it: `9.107832275s`, `987.654321ms`."""
    if nanoseconds >= 1_000_000_000:
        return f"{_trimmed(nanoseconds, 9)}s"
    return f"{_trimmed(nanoseconds, 6)}ms"


def _trimmed(value: int, digits: int) -> str:
    whole, rest = divmod(value, 10**digits)
    return f"{whole}.{rest:0{digits}}".rstrip("0").rstrip(".")
