"""The command line and environment of a shard become `ServeArgs`; only this file reads them.

Imports nothing heavy: `--help` must be instant.
"""

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import NoReturn, TypeVar

from kagami_proto.flag_values import PORT, THREADS, Real, Whole
from kagami_proto.tracing_plan import TracingPlan, plan_or_problem

# TGI's spellings, and int8 and int4, which say what they do.
QUANTIZE = (
    "int8",
    "int4",
    "eetq",
    "bitsandbytes",
    "bitsandbytes-nf4",
    "bitsandbytes-fp4",
    "fp8",
    "awq",
    "gptq",
    "compressed-tensors",
)
DTYPES = ("float16", "bfloat16", "float32")
N = TypeVar("N", int, float)
_SHARDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, slots=True)
class ServeArgs:
    """What a shard needs to know."""

    model_folder: Path
    uds_path: str
    """Prefix of the socket; `-{rank}` is appended"""
    dtype: str
    quantize: str | None
    """None: as the checkpoint says"""
    trust_remote_code: bool
    log_level: str
    json_output: bool
    rank: int
    world_size: int
    master_addr: str
    """Where ranks meet, if there are several: the host of rank 0"""
    master_port: int
    memory_fraction: float
    max_total_tokens: int
    """The longest sequence to be served; 0: the model's longest"""
    watermark_gamma: float
    watermark_delta: float
    num_threads: int
    """0: torch's own choice, or this rank's share of it"""
    block_size: int
    native: bool
    """Whether the CPU's own kernels may serve"""
    cache_folder: Path
    """Where the library built for this machine lies"""
    version: str
    tracing: TracingPlan | None
    """None: no traces"""
    tracing_problem: str
    """Why there are none although they were asked for"""
    otlp_step_spans: bool
    start_traceparent: str
    """The trace of this server's start; empty: none"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, exit code 2."""
        self.exit(2, f"error: {message} (see --help)\n")


def parse(argv: Sequence[str], environ: Mapping[str, str]) -> ServeArgs:
    """Parse the command line; exits with 2 and one line on a usage error."""
    parser = _parser()
    args = parser.parse_args(argv)
    folder = Path(args.model_id)
    if not folder.is_dir():
        parser.error(f"MODEL_ID: {args.model_id} is not a folder; the launcher resolves names")
    if args.sharded and (missing := [name for name in _SHARDED if not environ.get(name)]):
        parser.error(f"--sharded: the variable {missing[0]} is not set")
    wanted, problem = plan_or_problem(
        environ,
        endpoint=args.otlp_endpoint or environ.get("OTLP_ENDPOINT"),
        service_name=args.otlp_service_name or environ.get("OTLP_SERVICE_NAME"),
        part="shard",
    )

    def read(variable: str, kind: Callable[[str], N], default: N) -> N:
        try:
            return kind(environ[variable]) if variable in environ else default
        except ValueError as error:
            parser.error(f"invalid value {environ[variable]!r} in {variable}: {error}")

    parsed = ServeArgs(
        model_folder=folder,
        uds_path=args.uds_path,
        dtype=args.dtype,
        quantize=args.quantize,
        trust_remote_code=args.trust_remote_code,
        log_level=args.logger_level,
        json_output=args.json_output,
        rank=read("RANK", THREADS, 0),
        world_size=read("WORLD_SIZE", THREADS, 1),
        master_addr=environ.get("MASTER_ADDR", "localhost"),
        master_port=read("MASTER_PORT", PORT, 29500),
        memory_fraction=read("CUDA_MEMORY_FRACTION", Real(0, 1), 1.0),
        max_total_tokens=read("MAX_TOTAL_TOKENS", Whole(), 0),
        watermark_gamma=read("WATERMARK_GAMMA", Real(0, 1), 0.5),
        watermark_delta=read("WATERMARK_DELTA", Real(-1000, 1000), 2.0),
        num_threads=read("OMP_NUM_THREADS", THREADS, 0),
        block_size=args.block_size,
        native=environ.get("KAGAMI_NATIVE", "1") != "0",
        cache_folder=cache_folder(environ),
        version=version("kagami-tgi"),
        tracing=wanted,
        tracing_problem=problem,
        otlp_step_spans=args.otlp_step_spans,
        start_traceparent=environ.get("TRACEPARENT", ""),
    )
    if not 0 <= parsed.rank < parsed.world_size:
        parser.error(f"RANK {parsed.rank} is not below WORLD_SIZE {parsed.world_size}")
    return parsed


def _block_size(text: str) -> int:
    try:
        return Whole(1, 4096)(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"invalid value {text!r}: {error}") from error


def cache_folder(environ: Mapping[str, str]) -> Path:
    """Our folder in the user's own cache, by the XDG Base Directory Specification."""
    # Not Path.home(): a container's user may have none, which must not keep a shard from starting.
    home = environ.get("HOME") or os.path.expanduser("~")
    base = environ.get("XDG_CACHE_HOME") or Path(home, ".cache")
    return Path(base, "kagami", "native")


def process_arguments() -> ServeArgs:
    """The arguments of this process."""
    return parse(sys.argv[1:], os.environ)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="text-generation-server", description="One shard: a model on one device, over gRPC."
    )
    parser.add_argument("--version", action="version", version=version("kagami-tgi"))
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    # Never parsed here: __main__ hands it on before.
    commands.add_parser("download-weights", help="fetch a model from the hub into the hub cache")
    serve = commands.add_parser("serve", help="load a model and answer on a Unix socket")
    serve.add_argument("model_id", metavar="MODEL_ID", help="folder with config and safetensors")
    serve.add_argument(
        "--uds-path",
        default="/tmp/text-generation-server",
        help="prefix of the socket's path; -RANK is appended (default: %(default)s)",
    )
    serve.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="default: %(default)s")
    serve.add_argument(
        "--quantize",
        choices=QUANTIZE,
        help="weights in 8 or 4 bits; what config.json says of its weights needs no flag",
    )
    serve.add_argument("--trust-remote-code", action="store_true")
    serve.add_argument(
        "--sharded",
        action="store_true",
        help=f"one of several ranks: insist on the variables {', '.join(_SHARDED)}",
    )
    serve.add_argument("--logger-level", default="INFO", help="default: %(default)s")
    serve.add_argument("--json-output", action="store_true", help="log JSON lines")
    serve.add_argument("--otlp-endpoint", help="export traces to this OpenTelemetry collector")
    serve.add_argument(
        "--otlp-service-name", help="`service.name` of traces, with -shard behind it"
    )
    serve.add_argument(
        "--otlp-step-spans", action="store_true", help="export a span for each step, too"
    )
    serve.add_argument(
        "--block-size",
        type=_block_size,
        default=32,
        help="tokens in one KV block (default: %(default)s)",
    )
    return parser
