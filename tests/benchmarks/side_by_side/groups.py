"""One kind of weights: its servers are started, driven in turn, and ended."""

import asyncio
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, median

import torch
import uvloop
from tests.benchmarks.side_by_side import peers, processes, servers
from tests.benchmarks.side_by_side.bars import Measured
from tests.benchmarks.side_by_side.memory import PeakMemory
from tests.benchmarks.side_by_side.servers import NotStarted, Running
from tests.integration.conftest import embedded_folder, free_port

from kagami_benchmark import run as benchmark
from kagami_benchmark.cli import BenchmarkArgs, parse
from kagami_benchmark.figures import ResultRow
from kagami_benchmark.prompts import Words
from kagami_benchmark.workload import NAMED
from kagami_shard.machine.bandwidth import read_bandwidth

ALL = tuple(NAMED)
CPU = torch.device("cpu")
ANSWER_LIMIT_S, RUN_LIMIT_S = 180, 120
# vLLM's worker yields in a loop for a second behind its last step, and may: servers stand still
# only while another one is driven.
PAUSE_S = 2


@dataclass(frozen=True, slots=True)
class Group:
    """Servers that are compared with one another."""

    weights: str
    flags: tuple[str, ...]
    """Our launcher's."""
    workloads: tuple[str, ...]
    """Ours."""
    peers: Mapping[str, tuple[str, ...]]
    """Which workloads each peer takes part in."""


# In the order in which peers start: vLLM last, as it is not quiet right after its first answer.
# llama.cpp's slots do not share prompts and prefill slowly: W3 alone would take minutes.
GROUPS: Mapping[str, Group] = {
    group.weights: group
    for group in (
        Group("bf16", (), ALL, {"openvino-bf16": ALL, "vllm-bf16": ALL}),
        Group("8bit", ("--quantize", "int8"), ALL, {"llamacpp-q8_0": ("W1",), "vllm-w8a8": ALL}),
        Group("4bit", ("--quantize", "int4"), ("W1",), {"llamacpp-q4_0": ("W1",)}),
    )
}


@dataclass(frozen=True, slots=True)
class Settings:
    """What holds for all groups."""

    root: Path
    """The peers' folder."""
    model: str
    folder: Path | None
    """The model's; None: the embedded one."""
    workloads: tuple[str, ...]
    rounds: int
    peers: tuple[str, ...]
    """Those that may take part."""
    launcher_flags: tuple[str, ...]
    logs: Path


def measure(group: Group, settings: Settings, memory: PeakMemory, notes: list[str]) -> Measured:
    """All figures of a group; raises `NotStarted` where our own server does not start."""
    names = [name for name in group.peers if name in settings.peers]
    installed, lacking = peers.find(settings.root, settings.model, names)
    notes += lacking
    starts: dict[str, float] = {}
    peaks: dict[str, int] = {}
    rows: list[ResultRow] = []
    with ExitStack() as stack:
        ours = _start_ours(group, settings, memory, stack, starts)
        others = [
            server
            for peer in installed
            if (server := _start_peer(peer, settings, memory, stack, notes)) is not None
        ]
        starts |= {server.name: server.start_s for server in others}
        for workload in group.workloads:
            if workload in settings.workloads:
                taking_part = [one for one in others if workload in group.peers[one.name]]
                rows += _drive(workload, [ours, *taking_part], [ours, *others], settings, notes)
        peaks = {one.name: memory.peak(one.session) for one in (ours, *others)}
    return Measured(group.weights, ours.name, rows, starts, peaks)


def _start_ours(
    group: Group,
    settings: Settings,
    memory: PeakMemory,
    stack: ExitStack,
    starts: dict[str, float],
) -> Running:
    """Start as often as there are rounds, for a median; the last one stays."""
    flags = (*group.flags, *settings.launcher_flags)

    def start() -> AbstractContextManager[Running]:
        plan = servers.our_plan(group.weights, flags, settings.folder, settings.logs)
        _tell(f"{plan.name}: start")
        return servers.running(plan, settings.logs, memory)

    times = []
    for _ in range(settings.rounds - 1):
        with start() as server:
            times.append(server.start_s)
    ours = stack.enter_context(start())
    starts[ours.name] = median([*times, ours.start_s])
    return ours


def _start_peer(
    peer: peers.Installed,
    settings: Settings,
    memory: PeakMemory,
    stack: ExitStack,
    notes: list[str],
) -> Running | None:
    """None where it does not start: the others are measured without it."""
    port, cores = free_port(), os.sched_getaffinity(0)
    plan = servers.Plan(
        name=peer.peer.name,
        command=peer.command(port=port, num_threads=len(cores)),
        environment=peer.environment(os.environ, cores=cores),
        port=port,
        limit_s=peer.peer.start_limit_s,
    )
    _tell(f"{plan.name}: start")
    try:
        return stack.enter_context(servers.running(plan, settings.logs, memory))
    except NotStarted as error:
        notes.append(str(error))
        _tell(str(error))
        return None


def _drive(
    workload: str,
    targets: Sequence[Running],
    up: Sequence[Running],
    settings: Settings,
    notes: list[str],
) -> list[ResultRow]:
    """One workload on every target in turn; whoever else is `up` stands still meanwhile."""
    ours, *others = targets
    limits: list[float] = []

    @contextmanager
    def turn(name: str) -> Iterator[None]:
        with processes.stopped({one.session for one in up if one.name != name}):
            if name == ours.name:
                limits.append(read_bandwidth(CPU))
            yield
            if name == ours.name:
                limits.append(read_bandwidth(CPU))

    folder = settings.folder or embedded_folder()
    args = parse(
        [
            *("--url", ours.url, "--name", ours.name),
            *(part for one in others for part in ("--peer", f"{one.name}={one.url}")),
            *("--tokenizer-name", str(folder), "--workload", workload),
            *("--runs", str(settings.rounds), "--pause", str(PAUSE_S)),
            *("--duration", str(RUN_LIMIT_S), "--timeout", str(ANSWER_LIMIT_S)),
        ]
    )
    assert isinstance(args, BenchmarkArgs)
    rows: list[ResultRow] = []
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(benchmark.measure(args, Words.load(folder), rows, turn))
    notes += unequal(rows)
    told = servers.told_bandwidth(ours)
    return [of_present_limit(row, told, limits[-2:]) for row in rows]


def of_present_limit(row: ResultRow, told: float, limits: Sequence[float]) -> ResultRow:
    """The share of what the memory gave before and behind the last run, not at the server's start.

    `told` is what the server measured then, in bytes a second; neighbours change it by the minute.
    """
    if row.bandwidth_share is None or not all(limits):
        return row
    return replace(row, bandwidth_share=row.bandwidth_share * told / fmean(limits))


def unequal(rows: Sequence[ResultRow]) -> list[str]:
    """Where servers did not do the same work: requests that failed, other counts of tokens."""
    notes = []
    for row in rows:
        place = f"{row.target} {row.workload.name}"
        if row.num_succeeded < row.num_requests:
            notes.append(f"{place}: {row.num_succeeded} of {row.num_requests} requests succeeded")
        if row.num_succeeded:
            prompt, output = row.prompt_tokens / row.num_succeeded, row.workload.output
            made = row.output_tokens / row.num_succeeded
            wanted = row.workload.prefix_tokens + row.workload.prompt.low
            if (prompt, made) != (wanted, output.low):
                notes.append(f"{place}: {prompt:g} tokens in and {made:g} out, on average")
    return notes


def _tell(text: str) -> None:
    sys.stderr.write(f"{text}\n")
