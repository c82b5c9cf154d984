"""What will be started, decided before anything is: argv and environment of every child.

Pure: reads no file, no variable (only the working directory, for a relative path), starts nothing.
Also the arguments' checks, with TGI's texts, and what of the flags is refused or has no effect.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kagami_launcher.cli import Invocation, LauncherArgs, debug_text, flags, option
from kagami_launcher.model.source import ModelSource
from kagami_proto.tracing_plan import TracingPlan, plan_or_problem
from kagami_proto.values import DEVICE_POLICIES

SHARD_COMMAND = "text-generation-server"
ROUTER_COMMAND = "text-generation-router"
_CUDA_LAYOUTS = ("exl2", "marlin")


class LaunchFailed(Exception):
    """The launcher ends with exit code 1 and one line, TGI's `Error: {Variant}("{text}")`."""

    def __init__(self, variant: str, text: str = "") -> None:
        super().__init__(f"{variant}({debug_text(text)})" if text else variant)


class NotSupported(LaunchFailed):
    """A flag asks for something that this version cannot do."""

    def __init__(self, what: str) -> None:
        super().__init__("ArgumentValidation", f"{what} is not supported yet")


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


@dataclass(frozen=True, slots=True)
class Devices:
    """What the machine offers: GPUs that a shard may use, and the name of their kind."""

    num_cuda: int
    card: str = ""  # nvidia-smi's name in lower case with dashes; empty = unknown
    num_listed: int | None = None  # by the variables that choose devices; None = none is set

    def compute_type(self, num_shard: int) -> str:
        """What goes out in the `x-compute-type` header."""
        return f"{num_shard}-{self.card or 'cuda'}" if self.num_cuda else f"{num_shard}-cpu"


def check(args: LauncherArgs, devices: Devices) -> int:
    """Refuse what contradicts itself, in TGI's order and words, then what is not supported.

    Returns the number of shards.
    """
    input_tokens = _max_input_tokens(args)
    total = args.max_total_tokens
    if input_tokens is not None and total is not None and input_tokens >= total:
        _refuse(f"`max_input_tokens`({input_tokens}) must be < `max_total_tokens`({total})")
    if args.validation_workers == 0:
        _refuse("`validation_workers` must be > 0")
    pool = args.max_batch_total_tokens
    if total is not None and pool is not None and total > pool:
        _refuse(
            f"`max_total_tokens` must be <= `max_batch_total_tokens`. Given: {total} and {pool}"
        )
    if args.ngrok:
        if args.ngrok_authtoken is None:
            _refuse("`ngrok-authtoken` must be set when using ngrok tunneling")
        if args.ngrok_edge is None:
            _refuse("`ngrok-edge` must be set when using ngrok tunneling")
    num_shard = _num_shard(args, devices)
    if not 0 < args.cuda_memory_fraction <= 1:
        _refuse(f"`cuda_memory_fraction` must be in (0, 1]. Given: {args.cuda_memory_fraction}")
    if args.watermark_gamma is not None and not 0 < args.watermark_gamma < 1:
        _refuse(f"`watermark_gamma` must be > 0 and < 1. Given: {args.watermark_gamma}")
    _check_supported(args)
    return num_shard


def _refuse(text: str) -> None:
    raise LaunchFailed("ArgumentValidation", text)


def _max_input_tokens(args: LauncherArgs) -> int | None:
    new, old = args.max_input_tokens, args.max_input_length
    if new is not None and old is not None:
        _refuse(
            f"Both `max_input_tokens` ({new}) and `max_input_length` ({old}) are set. "
            "Please define only `max_input_tokens` as "
            "`max_input_length is deprecated for naming consistency."
        )
    return old if new is None else new


def _num_shard(args: LauncherArgs, devices: Devices) -> int:
    """TGI's table: what was given, else a shard for each listed device, else one.

    | sharded | num_shard | shards            |
    |---------|-----------|-------------------|
    | true    | -         | devices, at least 2 |
    | true    | n         | n, at least 2     |
    | false   | -         | 1                 |
    | -       | -         | devices, else 1   |
    | -, false | n        | n                 |
    """
    num_shard = args.num_shard
    if args.sharded and num_shard is None:
        num_shard = _one_for_each_device(devices)
    elif args.sharded and num_shard is not None and num_shard <= 1:
        _refuse("`sharded` is true but `num_shard` <= 1")
    elif num_shard is None:
        num_shard = 1 if args.sharded is False else max(1, devices.num_listed or 1)
    if num_shard < 1:
        _refuse("`num_shard` cannot be < 1")
    if num_shard > 1 and args.quantize == "exl2":
        _refuse("Sharding is currently not supported with `exl2` quantization")
    return num_shard


def _one_for_each_device(devices: Devices) -> int:
    if devices.num_listed is None:
        raise LaunchFailed(
            "NotEnoughCUDADevices",
            "--num-shard and CUDA_VISIBLE_DEVICES/NVIDIA_VISIBLE_DEVICES/ZE_AFFINITY_MASK are not "
            "set",
        )
    if devices.num_listed <= 1:
        raise LaunchFailed(
            "NotEnoughCUDADevices",
            f"`sharded` is true but only found {devices.num_listed} CUDA devices",
        )
    return devices.num_listed


def _check_supported(args: LauncherArgs) -> None:
    if args.quantize in _CUDA_LAYOUTS:
        _refuse(
            f"--quantize {args.quantize} is not supported: its files are laid out for CUDA "
            "kernels; serve the model's gptq or awq checkpoint, or the unquantized one with "
            "--quantize int4"
        )
    refused = (
        (bool(args.speculate), f"--speculate {args.speculate}"),
        (bool(args.lora_adapters), "--lora-adapters"),
        (args.ngrok, "--ngrok"),
    )
    for is_given, what in refused:
        if is_given:
            raise NotSupported(what)


def warnings(invocation: Invocation, devices: Devices, num_shard: int) -> list[str]:
    """One line for each given flag that changes nothing, and for each one to be careful with."""
    args = invocation.args
    lines = [
        f"`{option(item.name)}` has no effect: {flag.unused}"
        for item, flag in flags()
        if flag.unused and item.name in invocation.given
    ]
    if "cuda_memory_fraction" in invocation.given and not devices.num_cuda:
        lines.append("`--cuda-memory-fraction` has no effect: there is no CUDA device")
    if num_shard == 1:
        lines += [
            f"`{option(name)}` has no effect: there is only one shard"
            for name in ("master_addr", "master_port")
            if name in invocation.given
        ]
    if args.trust_remote_code:
        lines.append(
            f"`trust_remote_code` is set. Trusting that model `{args.model_id}` do not contain "
            "malicious code."
        )
    return lines


def max_batch_prefill_tokens(
    args: LauncherArgs, devices: Devices, max_positions: int | None
) -> int:
    """The given value, or one that keeps a step short on this device and fits the model."""
    if args.max_batch_prefill_tokens is not None:
        return args.max_batch_prefill_tokens
    base = DEVICE_POLICIES["cuda" if devices.num_cuda else "cpu"].prefill_chunk
    limits = (base, max_positions, args.max_batch_total_tokens)
    return min(limit for limit in limits if limit is not None)


def download_command(args: LauncherArgs, *, on_terminal: bool) -> list[str]:
    """The command that brings a hub's model into the hub cache."""
    argv = [sys.executable, "-P", "-m", "kagami_launcher.download", args.model_id, "--json-output"]
    argv += _optional("--revision", args.revision)
    argv += ["--trust-remote-code"] if args.trust_remote_code else []
    # Where people watch, a bar instead of lines; never into a log.
    argv += ["--progress"] if on_terminal and not args.json_output else []
    return argv


def socket_prefix(args: LauncherArgs) -> str:
    """The sockets' path without `-{rank}`, absolute: gRPC reads `unix://x-0` as a host's name."""
    return str(Path(f"{args.shard_uds_path}-").absolute())[:-1]


def conversion(invocation: Invocation, source: ModelSource) -> list[str]:
    """The module and arguments that make the model's folder."""
    args = invocation.args
    argv = ["kagami_launcher.convert.run", str(source.origin), str(source.folder)]
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
        ("--graceful-termination-timeout", _drain_s(args.graceful_termination_timeout)),
    )
    argv = [ROUTER_COMMAND, "--json-output"]
    for name, value in required:
        argv += [name, str(value)]
    argv += _optional("--max-input-tokens", _max_input_tokens(args))
    argv += _optional("--max-total-tokens", args.max_total_tokens)
    argv += _optional("--max-batch-total-tokens", args.max_batch_total_tokens)
    argv += _optional("--max-batch-size", args.max_batch_size)
    argv += _optional("--tokenizer-config-path", args.tokenizer_config_path)
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
    """What of the grace time is for running requests; the rest is for telling those cut off."""
    return f"{grace_s - min(2, grace_s / 4):g}"


def _optional(name: str, value: object | None) -> list[str]:
    return [] if value is None else [name, str(value)]


def hub_environment(args: LauncherArgs) -> dict[str, str]:
    """What tells a child where the hub cache is, when a flag does."""
    cache = args.huggingface_hub_cache
    return {"HUGGINGFACE_HUB_CACHE": cache} if cache is not None else {}
