"""Measures: for each workload a few runs on every server in turn, then the table.

In each round every server is measured once, so that other load on the machine affects all alike.
"""

import asyncio
import sys
from asyncio import sleep
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, AsyncExitStack, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime

import aiohttp
import msgspec
import uvloop

from kagami_benchmark import facts, report
from kagami_benchmark.cli import BenchmarkArgs
from kagami_benchmark.client import Client, connecting
from kagami_benchmark.figures import ResultRow, summarize
from kagami_benchmark.load import Run, drive
from kagami_benchmark.prompts import Words
from kagami_benchmark.routes import ROUTES, Asking
from kagami_benchmark.screen import View, choose_view
from kagami_benchmark.targets import COMPLETIONS, Target
from kagami_benchmark.workload import Workload

# Used if the server does not say and the flag is not given; from TGI's examples.
_NO_MODEL = "tgi"
_INTERRUPTED = 130

# A context manager around each run, made from the name of the measured server.
AroundRun = Callable[[str], AbstractContextManager[object]]


class BadFlags(Exception):
    """Flags that do not fit together, or a file that cannot be read."""


def run(args: BenchmarkArgs) -> int:
    """Measure; the exit code: 0, 1 when no request succeeded, 2 for flags that do not fit."""
    try:
        _check(args)
        words = Words.common() if args.tokenizer is None else Words.load(args.tokenizer)
    except (BadFlags, ValueError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    rows: list[ResultRow] = []
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        try:
            runner.run(measure(args, words, rows))
            code = 0 if any(row.num_succeeded for row in rows) else 1
        except KeyboardInterrupt:
            code = _INTERRUPTED
    try:
        _tell(args, rows)
    except OSError as error:
        sys.stderr.write(f"error: {error.filename}: {error.strerror}\n")
        return 1
    return code


def _check(args: BenchmarkArgs) -> None:
    """Refuse flags that the routes of the servers do not take."""
    for target in args.targets:
        if args.as_ids and target.path != COMPLETIONS:
            raise BadFlags(f"--prompt-kind ids: {target.path} takes texts only")
        for name in args.sampling:
            if name not in ROUTES[target.path].sampling:
                flag = f"--{name.replace('_', '-')}"
                raise BadFlags(f"{flag}: {target.path} does not know {name}")


def _tell(args: BenchmarkArgs, rows: list[ResultRow]) -> None:
    sys.stdout.write(report.markdown(rows))
    created = datetime.now(UTC).isoformat(timespec="seconds")
    whole = report.Report(report.tool(), created, report.machine(), rows)
    report.write(whole, json_path=args.json_path, markdown_path=args.markdown_path)


@dataclass(frozen=True, slots=True)
class _Server:
    """One target, its client, and the name of its model."""

    target: Target
    client: Client
    model: str


async def measure(
    args: BenchmarkArgs, words: Words, rows: list[ResultRow], around_run: AroundRun = nullcontext
) -> None:
    """Measure every workload on every server; adds each row when it is done."""
    async with AsyncExitStack() as stack:
        session = await stack.enter_async_context(connecting(args.api_key))
        servers = [await _meet(args, session, target) for target in args.targets]
        view = stack.enter_context(choose_view(is_plain=args.is_plain))
        for workload in args.workloads:
            runs: Mapping[str, list[Run]] = {target.name: [] for target in args.targets}
            for number in range(-args.warmups, args.runs):
                for server in servers:
                    await sleep(args.pause_s)
                    with around_run(server.target.name):
                        one = await _run_once(args, words, server, workload, number, view)
                    if number >= 0:
                        runs[server.target.name].append(one)
            for server in servers:
                row = await _row(session, server, workload, runs[server.target.name])
                rows.append(row)
                view.add(row)


async def _meet(args: BenchmarkArgs, session: aiohttp.ClientSession, target: Target) -> _Server:
    model = args.model or await facts.model_name(session, target.origin) or _NO_MODEL
    client = Client(session, target.url, ROUTES[target.path].read, timeout_s=args.timeout_s)
    return _Server(target, client, model)


async def _run_once(
    args: BenchmarkArgs,
    words: Words,
    server: _Server,
    workload: Workload,
    number: int,
    view: View,
) -> Run:
    """Measure once; runs with negative numbers are warm-ups."""
    seed = f"{args.seed} {workload.name} {number}"
    asking = Asking(server.model, args.ignore_eos, args.as_ids, args.sampling)
    to_body = ROUTES[server.target.path].body
    bodies = [
        msgspec.json.encode(to_body(prompt, asking)) for prompt in words.prompts(workload, seed)
    ]
    run = Run(len(bodies))
    title = f"{server.target.name}  {workload.name}: {workload.describe()}"
    stage = f"run {number + 1} of {args.runs}" if number >= 0 else "warm-up"
    async with view.watching(run, f"{title}  ({stage})"):
        await drive(run, workload, bodies, server.client.ask, duration_s=args.duration_s, seed=seed)
    return run


async def _row(
    session: aiohttp.ClientSession, server: _Server, workload: Workload, runs: Sequence[Run]
) -> ResultRow:
    target = server.target
    share = await facts.bandwidth_share(session, target.origin)
    return summarize(target.name, target.url, server.model, workload, runs, share)
