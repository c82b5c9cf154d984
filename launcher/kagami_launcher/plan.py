"""The command line and the environment of every child, decided before any is started.

Pure: starts nothing and reads no file and no variable (only the working directory, for a relative
path).
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kagami_launcher.checks import max_input_tokens
from kagami_launcher.cli import Invocation, LauncherArgs, option
from kagami_launcher.devices import Devices
from kagami_launcher.model.source import ModelSource
from kagami_proto.tracing_plan import TracingPlan, plan_or_problem

SHARD_COMMAND = "text-generation-server"
ROUTER_COMMAND = "text-generation-router"


@dataclass(frozen=True, slots=True)
class ShardPlan:
    """One shard: its command line, what its environment adds, and where it will answer."""

    rank: int
    socket: str
    argv: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RouterPlan:
    """The router: its command line and what its environment adds."""

    argv: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)


def max_batch_prefill_tokens(
    args: LauncherArgs, devices: Devices, max_positions: int | None
) -> int:
    """The given value, or one that keeps a step short on this device and fits the model."""
    if args.max_batch_prefill_tokens is not None:
        return args.max_batch_prefill_tokens
    limits = (devices.policy.prefill_chunk, max_positions, args.max_batch_total_tokens)
    return min(limit for limit in limits if limit is not None)


def download_command(args: LauncherArgs, *, on_terminal: bool) -> list[str]:
    """The command that brings a hub's model into the hub cache."""
    argv = [sys.executable, "-P", "-m", "kagami_launcher.download", args.model_id, "--json-output"]
    argv += _optional("--revision", args.revision)
    argv += ["--trust-remote-code"] if args.trust_remote_code else []
    # A progress bar on a terminal, lines in a log.
    argv += ["--progress"] if on_terminal and not args.json_output else []
    return argv


def socket_prefix(args: LauncherArgs) -> str:
    """The sockets' path without `-{rank}`, absolute: gRPC reads `unix://x-0` as a host's name."""
    return str(Path(f"{args.shard_uds_path}-").absolute())[:-1]


def conversion(invocation: Invocation, source: ModelSource) -> list[str]:
    """The module and arguments that make the model's folder."""
    args = invocation.args
    argv = ["kagami_launcher.convert", str(source.origin), str(source.folder)]
    argv += ["--model-id", args.model_id, *_optional("--revision", args.revision)]
    argv += _optional("--base", source.base)
    argv += ["--trust-remote-code"] if args.trust_remote_code else []
    return argv


def plan_shard(
    invocation: Invocation,
    source: ModelSource,
    *,
    log_level: str,
    rank: int = 0,
    num_shard: int = 1,
) -> ShardPlan:
    """The command that serves the model's weights, or one of `num_shard` parts, on one device."""
    args = invocation.args
    argv = [SHARD_COMMAND, "serve", str(source.folder), "--uds-path", socket_prefix(args)]
    argv += ["--logger-level", log_level, "--json-output"]
    argv += _optional("--dtype", args.dtype)
    argv += _optional("--quantize", args.quantize)
    argv += ["--trust-remote-code"] if args.trust_remote_code else []
    argv += ["--sharded"] if num_shard > 1 else []
    argv += _traces(invocation)
    argv += ["--otlp-step-spans"] if args.otlp_step_spans else []
    environment = {
        "RANK": str(rank),
        "WORLD_SIZE": str(num_shard),
        "MASTER_ADDR": args.master_addr,
        "MASTER_PORT": str(args.master_port),
        "CUDA_MEMORY_FRACTION": f"{args.cuda_memory_fraction:g}",
        **hub_environment(args),
    }
    if num_shard > 1:
        # A rank that loses the others says so itself; torch would add a C++ stack trace.
        environment["TORCH_CPP_LOG_LEVEL"] = invocation.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR")
    for name in ("max_total_tokens", "watermark_gamma", "watermark_delta"):
        if (value := getattr(args, name)) is not None:
            environment[name.upper()] = f"{value:g}" if isinstance(value, float) else str(value)
    return ShardPlan(rank, f"{socket_prefix(args)}-{rank}", tuple(argv), environment)


def plan_router(
    invocation: Invocation,
    source: ModelSource,
    devices: Devices,
    *,
    prefill_tokens: int,
    num_shard: int = 1,
) -> RouterPlan:
    """The command that serves HTTP. What the operator did not give, the router decides itself."""
    args, given = invocation.args, invocation.given
    required: Sequence[tuple[str, object]] = (
        ("--tokenizer-name", source.folder),
        ("--served-model-name", source.model_id),
        ("--master-shard-uds-path", f"{socket_prefix(args)}-0"),
        ("--hostname", args.hostname),
        ("--port", args.port),
        ("--max-client-batch-size", args.max_client_batch_size),
        ("--max-concurrent-requests", args.max_concurrent_requests),
        ("--max-best-of", args.max_best_of),
        ("--max-stop-sequences", args.max_stop_sequences),
        ("--max-top-n-tokens", args.max_top_n_tokens),
        ("--max-batch-prefill-tokens", prefill_tokens),
        ("--validation-workers", args.validation_workers),
        ("--payload-limit", args.payload_limit),
        ("--header-timeout", args.header_timeout),
        ("--body-timeout", args.body_timeout),
        ("--keep-alive-timeout", args.keep_alive_timeout),
        ("--write-timeout", args.write_timeout),
        ("--graceful-termination-timeout", _drain_s(args.graceful_termination_timeout)),
    )
    argv = [ROUTER_COMMAND, "--json-output"]
    for name, value in required:
        argv += [name, str(value)]
    argv += _optional("--max-input-tokens", max_input_tokens(args))
    argv += _optional("--max-total-tokens", args.max_total_tokens)
    argv += _optional("--max-batch-total-tokens", args.max_batch_total_tokens)
    argv += _optional("--max-batch-size", args.max_batch_size)
    argv += _optional("--tokenizer-config-path", args.tokenizer_config_path)
    argv += _optional("--tool-call-parser", args.tool_call_parser)
    argv += _optional("--reasoning-parser", args.reasoning_parser)
    argv += _optional("--caller-header", args.caller_header or None)
    for name in ("waiting_served_ratio", "max_waiting_tokens", "prometheus_port"):
        argv += _optional(option(name), getattr(args, name) if name in given else None)
    argv += ["--disable-grammar-support"] if args.disable_grammar_support else []
    argv += _traces(invocation)
    argv += ["--otlp-include-content"] if args.otlp_include_content else []
    for origin in args.cors_allow_origin:
        argv += ["--cors-allow-origin", origin]
    compute_type = invocation.environ.get("COMPUTE_TYPE") or devices.compute_type(num_shard)
    environment = {"COMPUTE_TYPE": compute_type}
    if args.api_key is not None:
        environment["API_KEY"] = (
            args.api_key
        )  # not in argv: every user of the machine can read that
    return RouterPlan(tuple(argv), {**environment, **hub_environment(args)})


def _traces(invocation: Invocation) -> list[str]:
    """Where a child exports its traces to; the variables OTEL_* it reads itself."""
    args, given = invocation.args, invocation.given
    name = args.otlp_service_name if "otlp_service_name" in given else None
    return [
        *_optional("--otlp-endpoint", args.otlp_endpoint),
        *_optional("--otlp-service-name", name),
    ]


def trace_plan(invocation: Invocation) -> tuple[TracingPlan | None, str]:
    """Where the launcher's own spans go, or why they cannot."""
    args, given = invocation.args, invocation.given
    return plan_or_problem(
        invocation.environ,
        endpoint=args.otlp_endpoint,
        service_name=args.otlp_service_name if "otlp_service_name" in given else None,
        part="launcher",
    )


def _drain_s(grace_s: int) -> str:
    """The part of the grace time for running requests; in the rest, cut-off clients are told."""
    return f"{grace_s - min(2, grace_s / 4):g}"


def _optional(name: str, value: object | None) -> list[str]:
    return [] if value is None else [name, str(value)]


def hub_environment(args: LauncherArgs) -> dict[str, str]:
    """What tells a child where the hub cache is, when a flag does."""
    cache = args.huggingface_hub_cache
    return {"HUGGINGFACE_HUB_CACHE": cache} if cache is not None else {}
