"""Every user-facing flag of the launcher: the only place that reads argv and the environment.

The dataclass `LauncherArgs` is the table: one field for each flag of TGI 2.0.3 and 3.3, in the
order of 3.3's `Args` dump. A flag's environment variable is its name in capitals; the order is
command line, environment, default. A variable that is set but empty counts as not set.
Imports nothing heavy: `--help` and `--version` are instant.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, dataclass, field, fields
from importlib.metadata import version
from typing import Any, NoReturn, TypeVar, cast

from kagami_launcher.model.source import EMBEDDED_MODEL_ID
from kagami_proto.flag_values import PORT, SECONDS, THREADS, Real, Whole
from kagami_proto.hostnames import address_of_variable

PROGRAM = "text-generation-launcher"
DISTRIBUTION = "kagami-tgi"
_STARTUP_TIMEOUT_S = "1800"  # 140 GB from a disk of 100 MB/s take 1400 s

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Flag:
    """What the parser needs to know about a field beside its name and default."""

    parse: Callable[[str], object]
    group: str
    help: str
    short: str = ""
    in_environment: bool = True
    repeats: bool = False
    is_switch: bool = False
    choices: tuple[str, ...] = ()
    unused: str = ""  # why the flag has no effect (yet); logged when it is given


def _flag(default: T, parse: Callable[[str], object], group: str, help: str, **more: Any) -> T:
    return field(default=default, metadata={"flag": Flag(parse, group, help, **more)})


def _choice(default: T, choices: str, group: str, help: str, **more: Any) -> T:
    allowed = tuple(choices.split())

    def parse(value: str) -> str:
        if value not in allowed:
            raise ValueError(f"expected one of {', '.join(allowed)}")
        return value

    return _flag(default, parse, group, help, choices=allowed, **more)


def _switch(group: str, help: str, **more: Any) -> bool:
    return _flag(False, _boolean, group, help, is_switch=True, **more)


def _name(value: str) -> str:
    if not value:
        raise ValueError("expected a name or an address")
    return value


def _boolean(value: str) -> bool:
    if value not in ("true", "false"):
        raise ValueError("expected true or false")
    return value == "true"


def _counts(value: str) -> tuple[int, ...]:
    return tuple(_COUNT(part.strip()) for part in value.split(","))


_COUNT = Whole()
_AT_LEAST_1 = Whole(1)
_FACTOR = Real(-1e6, 1e6)
_GROUPS = _MODEL, _LIMITS, _BATCH, _SERVER, _SHARD, _LOGS = (
    "the model",
    "limits of a request",
    "batching and memory",
    "the HTTP server",
    "shards",
    "logs, traces, reports",
)
_NO_GRAPHS = "CUDA graphs are not captured yet"
_NO_ROPE = "the model's own rope scaling is used"
_NO_NGROK = "ngrok tunnels are not supported"


@dataclass(frozen=True, slots=True, kw_only=True)
class LauncherArgs:
    """The flags, parsed; names, defaults and order are TGI's."""

    model_id: str = _flag(
        EMBEDDED_MODEL_ID,
        str,
        _MODEL,
        "a hub id, a folder, or a .gguf file; none: the embedded model",
    )
    revision: str | None = _flag(None, str, _MODEL, "commit, branch or tag of a hub model")
    validation_workers: int = _flag(2, THREADS, _LIMITS, "tokenizer threads of the router")
    sharded: bool | None = _flag(
        None, _boolean, _SHARD, "true: a shard for each visible device; false: one shard"
    )
    num_shard: int | None = _flag(None, THREADS, _SHARD, "number of shards, a GPU for each")
    quantize: str | None = _choice(
        None,
        "awq eetq exl2 gptq marlin bitsandbytes bitsandbytes-nf4 bitsandbytes-fp4 fp8 "
        "compressed-tensors int8 int4",
        _MODEL,
        "weights in fewer bits, made at load: int8 (also eetq, bitsandbytes), int4 (also "
        "bitsandbytes-nf4, -fp4), fp8; awq, gptq, compressed-tensors and fp8 checkpoints need no "
        "flag; exl2 and marlin are refused",
    )
    speculate: int | None = _flag(
        None, _COUNT, _MODEL, "tokens to guess per step (refused above 0: not supported yet)"
    )
    dtype: str | None = _choice(
        None, "float16 bfloat16 float32", _MODEL, "type of the weights and of the computation"
    )
    kv_cache_dtype: str | None = _choice(
        None,
        "fp8_e4m3fn fp8_e5m2",
        _BATCH,
        "type of the KV cache",
        unused="it has the model's dtype",
    )
    trust_remote_code: bool = _switch(_MODEL, "run code that comes with the model")
    max_concurrent_requests: int = _flag(128, _COUNT, _LIMITS, "requests at a time; more get 429")
    max_best_of: int = _flag(2, _COUNT, _LIMITS, "largest `best_of`")
    max_stop_sequences: int = _flag(4, _COUNT, _LIMITS, "most `stop` strings")
    max_top_n_tokens: int = _flag(5, _COUNT, _LIMITS, "largest `top_n_tokens`")
    max_input_tokens: int | None = _flag(None, _AT_LEAST_1, _LIMITS, "longest prompt, in tokens")
    max_input_length: int | None = _flag(
        None, _AT_LEAST_1, _LIMITS, "old name of --max-input-tokens"
    )
    max_total_tokens: int | None = _flag(
        None, _AT_LEAST_1, _LIMITS, "longest prompt and answer together"
    )
    waiting_served_ratio: float = _flag(
        0.3, _FACTOR, _BATCH, "waiting to running requests before decoding is interrupted"
    )
    max_batch_prefill_tokens: int | None = _flag(
        None, _AT_LEAST_1, _BATCH, "prompt tokens in one step"
    )
    max_batch_total_tokens: int | None = _flag(
        None, _AT_LEAST_1, _BATCH, "upper bound of the KV pool"
    )
    max_waiting_tokens: int = _flag(
        20, _COUNT, _BATCH, "steps before waiting requests are forced in"
    )
    max_batch_size: int | None = _flag(None, _AT_LEAST_1, _BATCH, "most sequences in one step")
    cuda_graphs: tuple[int, ...] | None = _flag(
        None, _counts, _BATCH, "batch sizes to capture, with commas; 0: none", unused=_NO_GRAPHS
    )
    hostname: str = _flag("0.0.0.0", _name, _SERVER, "address or name to listen on")
    port: int = _flag(3000, PORT, _SERVER, "port to listen on", short="-p")
    prometheus_port: int = _flag(
        9000, PORT, _SERVER, "second port for /metrics, opened only if given"
    )
    shard_uds_path: str = _flag(
        "/tmp/text-generation-server", str, _SHARD, "prefix of the shards' sockets"
    )
    master_addr: str = _flag("localhost", str, _SHARD, "where shards meet: address")
    master_port: int = _flag(29500, PORT, _SHARD, "where shards meet: port")
    huggingface_hub_cache: str | None = _flag(None, str, _MODEL, "folder of the hub cache")
    weights_cache_override: str | None = _flag(
        None, str, _MODEL, "folder that stands for the hub: the weights of --model-id"
    )
    disable_custom_kernels: bool = _switch(
        _SHARD, "no custom kernels of BLOOM and GPT-NeoX", unused="there are none"
    )
    cuda_memory_fraction: float = _flag(1.0, _FACTOR, _BATCH, "share of the GPU's memory to use")
    rope_scaling: str | None = _choice(
        None, "linear dynamic", _MODEL, "rope scaling instead of the model's", unused=_NO_ROPE
    )
    rope_factor: float | None = _flag(
        None, _FACTOR, _MODEL, "factor of the rope scaling", unused=_NO_ROPE
    )
    json_output: bool = _switch(_LOGS, "write the log as JSON lines")
    otlp_endpoint: str | None = _flag(
        None,
        str,
        _LOGS,
        "export traces to this OpenTelemetry collector (http://host:4317; 4318: over HTTP)",
    )
    otlp_service_name: str = _flag(
        "text-generation-inference.router",
        str,
        _LOGS,
        "service name in traces; not given: kagami-router, kagami-shard, kagami-launcher",
    )
    cors_allow_origin: tuple[str, ...] = _flag(
        (), str, _SERVER, "allowed origin, may be repeated; none: any", repeats=True
    )
    api_key: str | None = _flag(None, str, _SERVER, "key that requests must bear")
    watermark_gamma: float | None = _flag(
        None, _FACTOR, _MODEL, "share of green tokens in a watermark (shard: 0.5)"
    )
    watermark_delta: float | None = _flag(
        None, _FACTOR, _MODEL, "bonus of green tokens in a watermark (shard: 2)"
    )
    ngrok: bool = _switch(_SERVER, "open a tunnel (refused: not supported)")
    ngrok_authtoken: str | None = _flag(None, str, _SERVER, "ngrok's token", unused=_NO_NGROK)
    ngrok_edge: str | None = _flag(None, str, _SERVER, "ngrok's edge", unused=_NO_NGROK)
    tokenizer_config_path: str | None = _flag(
        None, str, _MODEL, "tokenizer_config.json or .jinja template to use before the model's"
    )
    disable_grammar_support: bool = _switch(_LIMITS, "refuse requests with a grammar")
    env: bool = _switch(
        _LOGS, "print a report of the environment first", short="-e", in_environment=False
    )
    max_client_batch_size: int = _flag(
        4, _AT_LEAST_1, _LIMITS, "most prompts in one completion request"
    )
    lora_adapters: str | None = _flag(
        None, str, _MODEL, "adapters to load, with commas (refused: not supported yet)"
    )
    usage_stats: str = _choice(
        "on", "on off no-stack", _LOGS, "usage statistics", unused="none are ever sent"
    )
    payload_limit: int = _flag(
        2_000_000, _AT_LEAST_1, _SERVER, "longest body of a request, in bytes"
    )
    enable_prefill_logprobs: bool = _switch(
        _LIMITS, "return logprobs of prompts", unused="they are returned whenever asked for"
    )
    graceful_termination_timeout: int = _flag(
        90, _COUNT, _SHARD, "seconds from SIGTERM to SIGKILL for children", short="-g"
    )
    otlp_include_content: bool = _switch(_LOGS, "write prompts and answers into traces")
    otlp_step_spans: bool = _switch(_LOGS, "trace each step of the model, too")
    header_timeout: float = _flag(10.0, SECONDS, _SERVER, "seconds for the head of a request")
    body_timeout: float = _flag(30.0, SECONDS, _SERVER, "seconds in which a body stands still")
    keep_alive_timeout: float = _flag(
        75.0, SECONDS, _SERVER, "seconds that an idle connection stays open"
    )
    write_timeout: float = _flag(
        60.0, SECONDS, _SERVER, "seconds in which a client does not take its answer"
    )
    caller_header: str = _flag(
        "", str, _SERVER, "header, set by a trusted proxy, that tells callers apart"
    )
    tool_call_parser: str | None = _flag(
        None, str, _MODEL, "form of tool calls (router: as the chat template shows)"
    )
    reasoning_parser: str | None = _flag(
        None, str, _MODEL, "form of reasoning, or `none` (router: as the chat template shows)"
    )


@dataclass(frozen=True, slots=True)
class Invocation:
    """One call of the launcher: its flags, which of them were given, and the environment."""

    args: LauncherArgs
    given: frozenset[str]  # field names
    environ: Mapping[str, str]
    startup_timeout_s: int  # how long a shard may load

    @property
    def log_level(self) -> str:
        return self.environ.get("LOG_LEVEL") or "info"


def flags() -> list[tuple[Field[Any], Flag]]:
    """Every field of `LauncherArgs` with its flag, in order."""
    return [(item, item.metadata["flag"]) for item in fields(LauncherArgs)]


def option(name: str) -> str:
    """`max_best_of` -> `--max-best-of`."""
    return "--" + name.replace("_", "-")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, and the exit code that clap gives."""
        self.exit(2, f"error: {message} (see {PROGRAM} --help)\n")


def _build_parser() -> _Parser:
    parser = _Parser(
        prog=PROGRAM,
        usage="%(prog)s [FLAGS]",
        description="Serve a language model over HTTP: prepares the weights, starts the shards and "
        "the router, watches them. Every flag has an environment variable of the same name in "
        "capitals; the flag wins.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=34, width=100),
    )
    parser.add_argument(
        "-V", "--version", action="version", version=f"{PROGRAM} {version(DISTRIBUTION)}"
    )
    groups = {name: parser.add_argument_group(name) for name in _GROUPS}
    for item, flag in flags():
        names = [flag.short, option(item.name)] if flag.short else [option(item.name)]
        help_text = flag.help.replace("%", "%%") + (
            "" if item.default in (None, False, ()) else f" (default: {item.default})"
        )
        if flag.is_switch:
            groups[flag.group].add_argument(*names, action="store_true", help=help_text)
        else:
            groups[flag.group].add_argument(
                *names,
                action="append" if flag.repeats else "store",
                metavar="|".join(flag.choices) if len(flag.choices) in (2, 3) else "VALUE",
                help=help_text,
            )
    return parser


def parse(argv: Sequence[str], environ: Mapping[str, str]) -> Invocation:
    """Read the flags. A usage error ends the process: one line on stderr, exit code 2."""
    parser = _build_parser()
    on_command_line = vars(parser.parse_args(argv))
    values: dict[str, object] = {}
    for item, flag in flags():
        name, variable = item.name, item.name.upper()
        if name in on_command_line:
            raw, source = on_command_line[name], option(name)
        elif flag.in_environment and environ.get(variable):
            raw, source = environ[variable], f"{option(name)} (environment variable {variable})"
        else:
            continue
        try:
            values[name] = _value(flag, raw)
        except ValueError as error:
            parser.error(f"invalid value {raw!r} for {source}: {error}")
    patience = environ.get("KAGAMI_STARTUP_TIMEOUT") or _STARTUP_TIMEOUT_S
    try:
        startup_timeout_s = _COUNT(patience)
    except ValueError as error:
        parser.error(f"invalid value {patience!r} for KAGAMI_STARTUP_TIMEOUT: {error}")
    if "hostname" in values and "hostname" not in on_command_line:
        values["hostname"] = address_of_variable(str(values["hostname"]))
    args = LauncherArgs(**cast(dict[str, Any], values))
    return Invocation(args, frozenset(values), dict(environ), startup_timeout_s)


def _value(flag: Flag, raw: object) -> object:
    if raw is True:
        return True
    if flag.repeats:
        return tuple(raw) if isinstance(raw, list) else (str(raw),)
    return flag.parse(str(raw))


def dump(args: LauncherArgs) -> str:
    """`Args { … }` as Rust's pretty Debug prints it: what operators paste into bug reports."""
    lines = ["Args {"]
    for item, flag in flags():
        value = getattr(args, item.name)
        if item.name == "api_key" and value is not None:
            value = "***"
        optional = item.default is None
        shown = _debug(value, flag, 1 + (optional and value is not None))
        if optional and value is not None:
            shown = f"Some(\n        {shown},\n    )"
        lines.append(f"    {item.name}: {shown},")
    return "\n".join([*lines, "}"])


def _debug(value: object, flag: Flag, depth: int) -> str:
    match value:
        case None:
            return "None"
        case bool():
            return "true" if value else "false"
        case str() if flag.choices:
            return _variant(value)
        case str():
            return debug_text(value)
        case tuple():
            pad = "    " * depth
            inner = "".join(f"{pad}    {_debug(entry, flag, depth)},\n" for entry in value)
            return f"[\n{inner}{pad}]" if value else "[]"
        case _:
            return repr(value)


def debug_text(text: str) -> str:
    """A string literal as Rust's Debug prints it."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + escaped.replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t") + '"'


def _variant(choice: str) -> str:
    """The name of TGI's enum variant: `no-stack` -> `NoStack`."""
    if choice == "bfloat16":
        return "BFloat16"
    return "".join(part.capitalize() for part in choice.replace("_", "").split("-"))
