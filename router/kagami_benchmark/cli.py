"""Flags -> `BenchmarkArgs` or `Compare`; reads argv, and API_KEY of the environment.

A flag that TGI's benchmark has, too, has the same name. TGI's benchmark drives a shard's model step
with equal batches. This one drives a server, so a batch size is a number of clients.
"""

import argparse
import math
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from kagami_benchmark.targets import Target, parse_target
from kagami_benchmark.workload import NAMED, Length, Workload

DEFAULT_URL = "http://127.0.0.1:3000"
DEFAULT_BATCH_SIZES = (1, 2, 4, 8, 16, 32)
# Without a number of requests, a request rate is measured for this long.
SECONDS_OF_RATE = 10
MAX_REQUESTS = 1_000_000


@dataclass(frozen=True, slots=True)
class Compare:
    """Two files of results to compare."""

    before: Path
    after: Path


@dataclass(frozen=True, slots=True)
class BenchmarkArgs:
    """What to measure."""

    targets: tuple[Target, ...]
    workloads: tuple[Workload, ...]
    runs: int
    warmups: int
    duration_s: float
    pause_s: float
    """Seconds of pause before each run."""
    timeout_s: float
    model: str | None
    tokenizer: Path | None
    as_ids: bool
    ignore_eos: bool
    sampling: Mapping[str, float | int | bool]
    """Sampling parameters by their native names, without those that were not given."""
    seed: str
    api_key: str | None
    json_path: Path | None
    markdown_path: Path | None
    is_plain: bool


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        """Print one line and exit with code 2."""
        self.exit(2, f"error: {message} (see --help)\n")


def _count(low: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        number = int(text) if text.isascii() and text.isdecimal() else -1
        if not low <= number <= MAX_REQUESTS:
            raise argparse.ArgumentTypeError(f"{text!r} is no count from {low} to {MAX_REQUESTS}")
        return number

    return parse


def _counts(text: str) -> list[int]:
    return [_count(1)(part.strip()) for part in text.split(",")]


def _positive(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return number


def _rates(text: str) -> list[float]:
    return [_positive(part.strip()) for part in text.split(",")]


def _length(text: str) -> Length:
    low, dash, high = text.partition("-")
    parsed = Length(_count(1)(low), _count(1)(high if dash else low))
    if parsed.low > parsed.high:
        raise argparse.ArgumentTypeError(f"{text!r}: the first number is the greater")
    return parsed


def _workloads(text: str) -> list[str]:
    names = [*NAMED] if text == "all" else [part.strip() for part in text.split(",")]
    for name in names:
        if name not in NAMED:
            raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(NAMED)}, all")
    return names


def _peer(text: str) -> Target:
    name, equals, url = text.partition("=")
    if not name or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=URL")
    return _target(name, url)


def _url(text: str) -> Target:
    return _target("server", text)


def _target(name: str, url: str) -> Target:
    try:
        return parse_target(name, url)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


# Of TGI's benchmark: (flag, kind, what a server is told).
_SAMPLING: Sequence[tuple[str, Callable[[str], Any] | None, str]] = (
    ("--temperature", float, "temperature"),
    ("--top-k", int, "top_k"),
    ("--top-p", float, "top_p"),
    ("--typical-p", float, "typical_p"),
    ("--repetition-penalty", float, "repetition_penalty"),
    ("--frequency-penalty", float, "frequency_penalty"),
    ("--watermark", None, "watermark"),
    ("--do-sample", None, "do_sample"),
    ("--top-n-tokens", int, "top_n_tokens"),
)


def parse(
    argv: Sequence[str], environ: Mapping[str, str] = os.environ
) -> "BenchmarkArgs | Compare":
    """Parse the arguments; on an error prints one line and exits with code 2."""
    parser = _make_parser()
    given = parser.parse_args(argv)
    if given.compare is not None:
        return Compare(*given.compare)
    targets = (given.url._replace(name=given.name), *given.peer)
    names = [target.name for target in targets]
    if len({*names}) < len(names):
        parser.error(f"--peer: two servers have one name: {', '.join(names)}")
    if given.prompt_kind == "ids" and given.tokenizer_name is None:
        parser.error("--prompt-kind ids needs --tokenizer-name")
    own = _own_workloads(given)
    if own and given.workload:
        parser.error("--workload: its lengths and clients are fixed; leave out the other flags")
    workloads = [NAMED[name] for name in given.workload] or own or _own_workloads(given, True)
    if given.requests is not None:
        workloads = [replace(one, num_requests=given.requests) for one in workloads]
    return BenchmarkArgs(
        targets=targets,
        workloads=tuple(workloads),
        runs=given.runs or (3 if given.workload else 10),
        warmups=given.warmups,
        duration_s=given.duration,
        pause_s=given.pause,
        timeout_s=given.timeout,
        model=given.model,
        tokenizer=given.tokenizer_name,
        as_ids=given.prompt_kind == "ids",
        ignore_eos=not given.stop_at_eos,
        sampling={
            name: value
            for _, _, name in _SAMPLING
            if (value := getattr(given, name)) is not None and value is not False
        },
        seed=given.seed or secrets.token_hex(4),
        api_key=given.api_key or environ.get("API_KEY") or None,
        json_path=given.json,
        markdown_path=given.markdown,
        is_plain=given.plain,
    )


def _own_workloads(given: argparse.Namespace, with_defaults: bool = False) -> list[Workload]:
    """The workload that the flags describe; none if no such flag was given."""
    flags = (given.sequence_length, given.decode_length, given.prefix_length)
    if not (with_defaults or given.batch_size or given.rate or any(flags)):
        return []
    base = Workload(
        name="",
        prompt=given.sequence_length or Length(10, 10),
        output=given.decode_length or Length(8, 8),
        num_requests=0,
        prefix_tokens=given.prefix_length or 0,
    )
    rates = [
        replace(base, name=f"R{rate:g}", rate=rate, num_requests=math.ceil(SECONDS_OF_RATE * rate))
        for rate in given.rate
    ]
    sizes = given.batch_size or ([] if rates else DEFAULT_BATCH_SIZES)
    return rates + [
        replace(base, name=f"B{size}", concurrency=size, num_requests=size) for size in sizes
    ]


def _make_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="text-generation-benchmark",
        description="Drives a TGI or OpenAI server over HTTP and reports tokens a second, time to"
        " the first token, between tokens and to the end. Exits with 1 when no request succeeded.",
        allow_abbrev=False,
    )
    parser.add_argument("-V", "--version", action="version", version=version("kagami-tgi"))
    _add_servers(parser)
    _add_workloads(parser)
    _add_bounds(parser)
    sampling = parser.add_argument_group("sampling (default: greedy)")
    for flag, kind, _ in _SAMPLING:
        if kind is None:
            sampling.add_argument(flag, action="store_true")
        else:
            sampling.add_argument(flag, type=kind, metavar="N")
    _add_output(parser)
    return parser


def _add_servers(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("servers")
    group.add_argument(
        "--url",
        type=_url,
        default=_url(DEFAULT_URL),
        help="of the server; with the route (/generate_stream, /v1/completions,"
        f" /v1/chat/completions) or, for the first, without (default: {DEFAULT_URL})",
    )
    group.add_argument("--name", default="server", help="what tables call it")
    group.add_argument(
        "--peer",
        type=_peer,
        action="append",
        default=[],
        metavar="NAME=URL",
        help="another server, measured in turn with the first; repeatable",
    )
    group.add_argument("--model", help="name in OpenAI's requests (default: what the server says)")
    group.add_argument("--api-key", help="sent as `Authorization: Bearer` (better: API_KEY)")


def _add_workloads(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("workloads")
    named = "; ".join(f"{name}: {one.describe()}" for name, one in NAMED.items())
    group.add_argument(
        "--workload", type=_workloads, action="extend", default=[], help=f"all, or some: {named}"
    )
    group.add_argument(
        "-b",
        "--batch-size",
        type=_counts,
        action="extend",
        default=[],
        metavar="N,…",
        help="clients that each wait for their answer; several are measured one after another"
        f" (default: {','.join(map(str, DEFAULT_BATCH_SIZES))})",
    )
    group.add_argument(
        "--rate",
        type=_rates,
        action="extend",
        default=[],
        metavar="N,…",
        help="requests a second that come by themselves (a Poisson process)",
    )
    group.add_argument(
        "-s", "--sequence-length", type=_length, metavar="N|A-B", help="prompt tokens (default: 10)"
    )
    group.add_argument(
        "-d", "--decode-length", type=_length, metavar="N|A-B", help="new tokens (default: 8)"
    )
    group.add_argument(
        "--prefix-length",
        type=_count(0),
        metavar="N",
        help="tokens in front of all prompts of a run, new in each run (default: 0)",
    )
    group.add_argument(
        "-t",
        "--tokenizer-name",
        type=Path,
        metavar="PATH",
        help="folder with a tokenizer.json, or that file: for prompts of exact length"
        " (default: common words, each of which is mostly one token)",
    )
    group.add_argument(
        "--prompt-kind", choices=("text", "ids"), default="text", help="ids: /v1/completions only"
    )
    group.add_argument("--stop-at-eos", action="store_true", help="answers may end early")
    group.add_argument("--seed", help="of prompts and arrivals (default: another each time)")


def _add_bounds(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("bounds")
    group.add_argument(
        "-r", "--runs", type=_count(1), help="measured runs (default: 10, named workloads 3)"
    )
    group.add_argument("-w", "--warmups", type=_count(0), default=1, help="unmeasured (default: 1)")
    group.add_argument(
        "-n",
        "--requests",
        type=_count(1),
        help="in each run (default: the workload's, one for each client, or"
        f" {SECONDS_OF_RATE} seconds of the rate)",
    )
    group.add_argument(
        "--duration",
        type=_positive,
        default=120.0,
        help="seconds after which a run sends nothing more (default: 120)",
    )
    group.add_argument(
        "--pause",
        type=_positive,
        default=0.0,
        help="seconds before each run: some servers keep a core busy for a while behind their last"
        " answer, which the next one would pay for (default: 0)",
    )
    group.add_argument(
        "--timeout", type=_positive, default=300.0, help="seconds for one answer (default: 300)"
    )


def _add_output(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output")
    group.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    group.add_argument("--markdown", type=Path, metavar="FILE", help="write the table there")
    group.add_argument("--plain", action="store_true", help="no live screen, also on a terminal")
    group.add_argument(
        "--compare",
        type=Path,
        nargs=2,
        metavar=("A.json", "B.json"),
        help="measure nothing: print B's figures as multiples of A's",
    )
