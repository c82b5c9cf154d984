"""The processes of one launch: started, awaited and stopped in the right order.

At most one downloader or converter runs before the others. Then all shards and the router run. The
router stops before the shards: it needs all of them to finish its streams.
"""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from opentelemetry.context import get_current
from opentelemetry.trace import Tracer, get_current_span

from kagami_launcher import environment, sockets
from kagami_launcher.child import (
    Child,
    ChildEnded,
    HeldOutput,
    LogStyle,
    describe_end,
    exit_reason,
)
from kagami_launcher.cli import Invocation
from kagami_launcher.errors import LaunchFailed, Stopped
from kagami_launcher.notify import Notifier
from kagami_launcher.plan import RouterPlan, ShardPlan
from kagami_launcher.supervisor import StopAsked, Supervisor
from kagami_proto import logs
from kagami_proto.health import is_healthy
from kagami_proto.span_names import Key, SpanName
from kagami_proto.tracing import headers_of, span

log = logging.getLogger(__name__)

LAUNCHER_TARGET = "text_generation_launcher"
_ROUTER_TARGET = "text_generation_router"
_POLL_S, _PROBE_TIMEOUT_S, _WAITING_EVERY_S = 0.1, 1.0, 10.0
# Nobody is being served yet, so there is nothing to finish: router and shard together end in 5 s.
_STARTUP_GRACE_S = 2.0
# Without one of its shards a model finishes nothing: what is left may say so, and hang no longer.
_BROKEN_GRACE_S = 5.0


@dataclass(slots=True, eq=False)
class _Shard:
    plan: ShardPlan
    process: Child
    is_ready: bool = False  # `Health` has answered

    def answers(self) -> bool:
        return Path(self.plan.socket).exists() and is_healthy(
            f"unix://{self.plan.socket}", _PROBE_TIMEOUT_S
        )

    @property
    def is_lost(self) -> bool:
        """Whether it no longer serves after it was ready; its process may not have ended yet."""
        return self.is_ready and not (self.process.is_running and self.answers())


class ProcessTree:
    """Owns every child of one launch, and says what the end of each of them means."""

    def __init__(
        self,
        invocation: Invocation,
        supervisor: Supervisor,
        notifier: Notifier,
        tracer: Tracer,
    ) -> None:
        self._invocation = invocation
        self._supervisor = supervisor
        self._notifier = notifier
        self._tracer = tracer
        self._preparing: Child | None = None  # the downloader or the converter
        self._shards: list[_Shard] = []  # by rank
        self._router: Child | None = None
        self._router_output: HeldOutput | None = None

    @property
    def sockets(self) -> list[str]:
        """Where the shards answer, by rank."""
        return [shard.plan.socket for shard in self._shards]

    def run_to_end(self, status: str, argv: Sequence[str], env: Mapping[str, str]) -> None:
        """Run a process that prepares the model; `status` is for the service manager.

        Raises `LaunchFailed` if it fails, `Stopped`.
        """
        self._notifier.starting(status)
        style = self._log_style(LAUNCHER_TARGET, renames=True)
        child = self._preparing = self._supervisor.start("download", argv, env, style)
        while child.is_running:
            if isinstance(self._supervisor.next_event(self._notifier.wait_s), StopAsked):
                raise Stopped
            self._notifier.still_starting()
        if child.exit_code:
            if child.exit_code < 0:
                log.error("Download process %s", describe_end(child))
            raise LaunchFailed("DownloadError", child.last_error)

    def start(self, shards: Sequence[ShardPlan], router: RouterPlan) -> None:
        """Start all shards and the router at once; wait until every one's `Health` answers, then
        until the router serves, which says `Connected` itself.

        The router's imports take half a second, less than a shard's start, so the two overlap; the
        router waits for the shards itself. Its lines are held until all shards are ready, so that
        the log has TGI's order.
        """
        self._notifier.starting(f"Loading {self._invocation.args.model_id}")
        around = get_current()
        with span(self._tracer, SpanName.START_ROUTER):
            of_router = _trace_context()
            attributes = {Key.WORLD_SIZE: len(shards)}
            with span(self._tracer, SpanName.START_SHARDS, attributes, context=around):
                self._start_shards(shards, partial(self._start_router, router, of_router))
            self._notifier.starting("Warming up")
            self._hear_router()
            while self._router is not None and not self._router.has_connected:
                self.raise_if_over(self._supervisor.next_event(_POLL_S))
                self._notifier.still_starting()

    def _start_shards(self, plans: Sequence[ShardPlan], meanwhile: Callable[[], None]) -> None:
        started = time.monotonic_ns()
        for plan in plans:
            self._start_shard(plan)
        meanwhile()
        limit_s = self._invocation.startup_timeout_s
        next_line_s = _WAITING_EVERY_S
        while waiting := self._still_loading(started):
            self.raise_if_over(self._supervisor.next_event(_POLL_S))
            self._notifier.still_starting()
            waited_s = (time.monotonic_ns() - started) / 1e9
            if waited_s >= next_line_s:
                for shard in waiting:
                    log.info("Waiting for shard to be ready...", extra=_about(shard.plan))
                next_line_s += _WAITING_EVERY_S
            if waited_s >= limit_s:
                log.error("Shard %s is not ready after %s s", waiting[0].plan.rank, limit_s)
                raise LaunchFailed("ShardCannotStart")

    def _still_loading(self, started_ns: int) -> list[_Shard]:
        """The shards that are not ready; says of each one that has become so how long it took."""
        for shard in self._shards:
            if not shard.is_ready and shard.answers():
                shard.is_ready = True
                duration = rust_duration(time.monotonic_ns() - started_ns)
                log.info("Shard ready in %s", duration, extra=_about(shard.plan))
        return [shard for shard in self._shards if not shard.is_ready]

    def _start_shard(self, plan: ShardPlan) -> None:
        command = self._command(plan.argv, "ShardCannotStart")
        sockets.clear(plan.socket)
        log.info("Starting shard", extra=_about(plan))
        environ = self._invocation.environ
        env = environment.for_shard(environ, {**plan.environment, **_trace_context()})
        style = self._log_style(LAUNCHER_TARGET, rank=plan.rank, renames=True)
        process = self._start("shard", command, env, style, "ShardCannotStart")
        self._shards.append(_Shard(plan, process))

    def _start_router(self, plan: RouterPlan, trace_context: Mapping[str, str]) -> None:
        command = self._command(plan.argv, "WebserverCannotStart")
        environ = self._invocation.environ
        env = environment.for_router(environ, {**plan.environment, **trace_context})
        style = self._log_style(_ROUTER_TARGET)
        output = self._router_output = self._supervisor.held_output()
        self._router = self._start("webserver", command, env, style, "WebserverCannotStart", output)

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
        style: LogStyle,
        variant: str,
        output: HeldOutput | None = None,
    ) -> Child:
        try:
            return self._supervisor.start(name, argv, env, style, output)
        except OSError as error:
            raise LaunchFailed(variant, f"cannot start {argv[0]}: {error.strerror}") from error

    def _log_style(self, target: str, rank: int | None = None, renames: bool = False) -> LogStyle:
        level = logs.level_of(self._invocation.log_level, target)
        return LogStyle(target, level, self._invocation.args.json_output, rank, renames)

    @property
    def _router_is_held(self) -> bool:
        """Whether shards are still loading: until they have, no line is about the router."""
        return self._router_output is None or self._router_output.is_held

    def _hear_router(self) -> None:
        if self._router_output is not None and self._router_output.is_held:
            log.info("Starting Webserver")
            self._router_output.release()

    def raise_if_over(self, event: ChildEnded | StopAsked | None) -> None:
        """Raise `Stopped` after a stop signal, `LaunchFailed` after the end of shard or router."""
        match event:
            case StopAsked():
                raise Stopped
            case ChildEnded(child) if child is self._router:
                self._blame_a_lost_shard()
                self._hear_router()
                log.error("Webserver Crashed")
                raise LaunchFailed("WebserverFailed")
            case ChildEnded(child):
                for shard in self._shards:
                    if shard.process is child:
                        raise self._failure_of(shard)
            case _:
                pass

    def _blame_a_lost_shard(self) -> None:
        """Raise if the router ended because a shard did: the router may be gone before its shard.

        A shard that still answers was not lost. One that does not is about to end, and its end is
        what the operator has to know; it may also hang, so that the wait has a limit.
        """
        is_shard_lost = any(shard.is_lost for shard in self._shards)
        until = time.monotonic() + (_BROKEN_GRACE_S if is_shard_lost else 0.0)
        while event := self._supervisor.next_event(max(0.0, until - time.monotonic())):
            self.raise_if_over(event)

    def _failure_of(self, shard: _Shard) -> LaunchFailed:
        """What the end of a shard means; says so in the log."""
        rank, is_loading = shard.plan.rank, self._router_is_held
        code = shard.process.exit_code
        if code is not None and code < 0:
            log.error("Shard process %s", describe_end(shard.process), extra={"rank": rank})
        log.error("Shard %s %s", rank, "failed to start" if is_loading else "crashed")
        return LaunchFailed("ShardCannotStart" if is_loading else "ShardFailed")

    def stop(self) -> None:
        """End whatever runs: the router first, with time to finish its streams, then all shards."""
        self._notifier.stopping()
        shards = [shard.process for shard in self._shards]
        grace_s = self._grace_s(shards)
        if self._preparing:
            self._supervisor.stop([self._preparing], grace_s)
        if self._router and self._router_is_held:  # it has served nobody, and no line named it
            self._supervisor.kill(self._router)
        elif self._router:
            self._supervisor.stop([self._router], grace_s)
        if shards:
            log.info("Shutting down shards")
            self._supervisor.stop(shards, grace_s)
        for child in (self._router, *shards):
            if child and child.exit_code and not child.was_asked_to_end and exit_reason(child):
                log.error("Last error of the %s: %s", child.name, exit_reason(child))

    def _grace_s(self, shards: Sequence[Child]) -> float:
        full_s = float(self._invocation.args.graceful_termination_timeout)
        if self._router is None or not self._router.has_connected:
            return min(full_s, _STARTUP_GRACE_S)
        is_broken = any(not (shard.is_running or shard.was_asked_to_end) for shard in shards)
        return min(full_s, _BROKEN_GRACE_S) if is_broken else full_s


def _trace_context() -> dict[str, str]:
    """The current span for a child, in the variables that OpenTelemetry names for it."""
    context = get_current_span().get_span_context()
    return {name.upper(): value for name, value in headers_of(context).items()}


def _about(plan: ShardPlan) -> dict[str, object]:
    return {"span": "shard-manager", "rank": plan.rank}


def rust_duration(nanoseconds: int) -> str:
    """A time as Rust's Debug prints it: `9.107832275s`, `987.654321ms`."""
    if nanoseconds >= 1_000_000_000:
        return f"{_trimmed(nanoseconds, 9)}s"
    return f"{_trimmed(nanoseconds, 6)}ms"


def _trimmed(value: int, digits: int) -> str:
    whole, rest = divmod(value, 10**digits)
    return f"{whole}.{rest:0{digits}}".rstrip("0").rstrip(".")
