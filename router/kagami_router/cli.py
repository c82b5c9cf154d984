"""argv and environment to `RouterArgs`; nobody else in this package reads either.

Flags are those of TGI's router in both its versions; a variable is named like its flag, in
capitals. Command line before environment before default. Imports nothing heavy: `--help` is fast.
"""

import argparse
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import Any, NamedTuple

from kagami_proto.flag_values import PORT, SECONDS, THREADS, Real, Whole
from kagami_proto.hostnames import address_of_variable
from kagami_proto.tracing_plan import TracingPlan, plan_or_problem

DEFAULT_PREFILL_TOKENS = 4096


@dataclass(frozen=True, slots=True)
class RouterArgs:
    """What the user asked for, typed; None = not given."""

    max_concurrent_requests: int
    max_best_of: int
    max_stop_sequences: int
    max_top_n_tokens: int
    max_input_tokens: int | None
    max_total_tokens: int | None
    waiting_served_ratio: float | None
    max_batch_prefill_tokens: int
    max_batch_total_tokens: int | None
    max_waiting_tokens: int | None
    max_batch_size: int | None
    max_client_batch_size: int
    hostname: str
    port: int
    prometheus_port: int | None
    master_shard_uds_path: str
    tokenizer_name: str
    served_model_name: str | None
    tokenizer_config_path: str | None
    validation_workers: int
    api_key: str | None
    json_output: bool
    tracing: TracingPlan | None
    """None = no traces"""
    tracing_problem: str
    """Why there are none although they were asked for; empty if there is no problem"""
    otlp_include_content: bool
    start_traceparent: str
    """The trace of this server's start; empty = none"""
    cors_allow_origin: tuple[str, ...]
    disable_grammar_support: bool
    tool_call_parser: str | None
    reasoning_parser: str | None
    payload_limit: int
    header_timeout: float
    body_timeout: float
    keep_alive_timeout: float
    write_timeout: float
    caller_header: str
    graceful_termination_timeout: float
    prefix_caching: bool
    log_level: str
    compute_type: str
    docker_label: str | None
    aip_predict_route: str | None
    aip_health_route: str | None
    """Where Vertex AI sends predictions and probes"""
    without_effect: tuple[str, ...]
    """Flags that were given and change nothing."""


class _Flag(NamedTuple):
    name: str
    kind: Callable[[str], Any] | None
    """None = a bare switch."""
    default: Any
    help: str
    has_effect: bool = True
    other_names: tuple[str, ...] = ()

    @property
    def variable(self) -> str:
        return self.name.removeprefix("--").replace("-", "_").upper()

    @property
    def field(self) -> str:
        return self.variable.lower()


def _list(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _name(text: str) -> str:
    if not text:
        raise ValueError("expected a name or an address")
    return text


_COUNT = Whole()
_AT_LEAST_1 = Whole(1)

_FLAGS = (
    _Flag("--max-concurrent-requests", _COUNT, 128, "requests served at once; more get 429"),
    _Flag("--max-best-of", _COUNT, 2, "upper bound of `best_of` and `n`"),
    _Flag("--max-stop-sequences", _COUNT, 4, "upper bound of the number of `stop` strings"),
    _Flag("--max-top-n-tokens", _COUNT, 5, "upper bound of `top_n_tokens`"),
    _Flag(
        "--max-input-tokens",
        _AT_LEAST_1,
        None,
        "longest prompt (default: max_total_tokens - 1)",
        other_names=("--max-input-length",),
    ),
    _Flag(
        "--max-total-tokens",
        _AT_LEAST_1,
        None,
        "prompt and new tokens of a request (default: what the model and the memory allow)",
    ),
    _Flag(
        "--waiting-served-ratio", Real(0, 1e6), None, "when waiting requests may interrupt decoding"
    ),
    _Flag(
        "--max-batch-prefill-tokens",
        _AT_LEAST_1,
        DEFAULT_PREFILL_TOKENS,
        "prompt tokens in one step",
    ),
    _Flag("--max-batch-total-tokens", _AT_LEAST_1, None, "upper bound of the KV cache in tokens"),
    _Flag("--max-waiting-tokens", _COUNT, None, "decode steps that waiting requests must wait"),
    _Flag("--max-batch-size", _AT_LEAST_1, None, "sequences in one step"),
    _Flag("--max-client-batch-size", _AT_LEAST_1, 4, "prompts in one completions request"),
    _Flag("--hostname", _name, "0.0.0.0", "address or name to listen on"),
    _Flag("--port", PORT, 3000, "port to listen on", other_names=("-p",)),
    _Flag("--prometheus-port", PORT, None, "second port for /metrics (default: none)"),
    _Flag(
        "--master-shard-uds-path",
        str,
        "/tmp/text-generation-server-0",
        "Unix socket of the first shard",
    ),
    _Flag("--tokenizer-name", str, "bigscience/bloom", "folder of the model's tokenizer"),
    _Flag(
        "--served-model-name",
        str,
        None,
        "what answers call the model (default: --tokenizer-name)",
    ),
    _Flag("--tokenizer-config-path", str, None, "file to read the chat template from"),
    _Flag("--revision", str, None, "ignored: --tokenizer-name is a folder", has_effect=False),
    _Flag("--trust-remote-code", None, False, "ignored: runs no model code", has_effect=False),
    _Flag("--validation-workers", THREADS, 2, "threads that tokenize long prompts"),
    _Flag("--api-key", str, None, "asked for as `Authorization: Bearer` (better: API_KEY)"),
    _Flag("--json-output", None, False, "log in JSON"),
    _Flag(
        "--otlp-endpoint",
        str,
        None,
        "export traces to this OpenTelemetry collector (http://host:4317; 4318: over HTTP)",
    ),
    _Flag("--otlp-service-name", str, None, "`service.name` of traces (default: kagami-router)"),
    _Flag("--otlp-include-content", None, False, "write prompts and answers into traces"),
    _Flag("--cors-allow-origin", _list, None, "allowed origin; repeatable (default: any)"),
    _Flag("--disable-grammar-support", None, False, "refuse grammars"),
    _Flag("--tool-call-parser", str, None, "form of calls (default: as the chat template shows)"),
    _Flag(
        "--reasoning-parser", str, None, "form of thoughts, or `none` (default: as the template)"
    ),
    _Flag("--payload-limit", _AT_LEAST_1, 2_000_000, "longest request body in bytes; not 0"),
    _Flag("--header-timeout", SECONDS, 10.0, "seconds for the head of a request"),
    _Flag("--body-timeout", SECONDS, 30.0, "seconds in which a body stands still"),
    _Flag("--keep-alive-timeout", SECONDS, 75.0, "seconds that an idle connection stays open"),
    _Flag("--write-timeout", SECONDS, 60.0, "seconds in which a client does not take its answer"),
    _Flag(
        "--caller-header",
        str,
        "",
        "header, set by a trusted proxy, that tells callers apart (default: their addresses)",
    ),
    _Flag(
        "--graceful-termination-timeout",
        Real(0, 1e6),
        90.0,
        "seconds that running requests have after SIGTERM",
        other_names=("-g",),
    ),
    _Flag("--usage-stats", str, None, "ignored: nothing is ever sent", has_effect=False),
    _Flag("--messages-api-enabled", None, False, "ignored: always on", has_effect=False),
    _Flag("--max-image-fetch-size", _COUNT, None, "ignored: fetches no images", has_effect=False),
    _Flag("--ngrok", None, False, "not supported", has_effect=False),
    _Flag("--ngrok-authtoken", str, None, "not supported", has_effect=False),
    _Flag("--ngrok-edge", str, None, "not supported", has_effect=False),
)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        """One line, exit code 2."""
        self.exit(2, f"error: {message} (see --help)\n")


def parse(argv: Sequence[str], environ: Mapping[str, str] = os.environ) -> RouterArgs:
    """The arguments; exits with code 2 and one line where they cannot be understood."""
    parser = _make_parser()
    given = vars(parser.parse_args(argv))
    values: dict[str, Any] = {}
    without_effect = []
    on_command_line = {name for name, value in given.items() if value is not None}
    for flag in _FLAGS:
        value = given.pop(flag.field)
        if value is None:
            value = _from_environment(parser, flag, environ)
        if value is not None and value is not False and not flag.has_effect:
            without_effect.append(flag.name)
        values[flag.field] = flag.default if value is None else value
    if "hostname" not in on_command_line:
        values["hostname"] = address_of_variable(values["hostname"])
    if environ.get("AIP_HTTP_PORT"):  # Vertex AI speaks to this port, whatever else was said
        values["port"] = _from_environment(
            parser, _Flag("--aip-http-port", PORT, None, ""), environ
        )
    origins = values.pop("cors_allow_origin") or []
    wanted, problem = plan_or_problem(
        environ,
        endpoint=values["otlp_endpoint"],
        service_name=values["otlp_service_name"],
        part="router",
    )
    for flag in _FLAGS:
        if flag.field not in RouterArgs.__dataclass_fields__:
            values.pop(flag.field)
    return RouterArgs(
        **values,
        tracing=wanted,
        tracing_problem=problem,
        start_traceparent=environ.get("TRACEPARENT", ""),
        cors_allow_origin=() if "*" in origins else tuple(origins),
        prefix_caching=environ.get("PREFIX_CACHING", "true").lower() in ("1", "true"),
        log_level=environ.get("LOG_LEVEL", "info"),
        compute_type=environ.get("COMPUTE_TYPE", "gpu+optimized"),
        docker_label=environ.get("DOCKER_LABEL"),
        aip_predict_route=_route(parser, environ, "AIP_PREDICT_ROUTE"),
        aip_health_route=_route(parser, environ, "AIP_HEALTH_ROUTE"),
        without_effect=tuple(without_effect),
    )


def _route(
    parser: argparse.ArgumentParser, environ: Mapping[str, str], variable: str
) -> str | None:
    path = environ.get(variable)
    if path and not path.startswith("/"):
        parser.error(f"invalid value {path!r} in the environment variable {variable}")
    return path or None


def _make_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="text-generation-router",
        description="HTTP in, batches out: serves a model that text-generation-server has loaded."
        " Every flag is also an environment variable (--max-best-of: MAX_BEST_OF).",
        allow_abbrev=False,
    )
    parser.add_argument(
        "-V", "--version", action="version", version=f"text-generation-router {own_version()}"
    )
    for flag in _FLAGS:
        names = (*flag.other_names, flag.name)
        shown = "" if flag.default in (None, False) else f" (default: {flag.default})"
        text = flag.help + shown
        if flag.kind is None:
            parser.add_argument(
                *names, dest=flag.field, action="store_const", const=True, help=text
            )
        elif flag.kind is _list:
            parser.add_argument(
                *names, dest=flag.field, action="extend", type=_list, metavar="ORIGIN", help=text
            )
        else:
            parser.add_argument(
                *names,
                dest=flag.field,
                type=partial(_typed, flag.kind),
                metavar="TEXT" if flag.kind in (str, _name) else "NUMBER",
                help=text,
            )
    return parser


def _typed(kind: Callable[[str], Any], text: str) -> Any:
    """What argparse calls: it shows the text of this error only."""
    try:
        return kind(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"invalid value {text!r}: {error}") from error


def _from_environment(
    parser: argparse.ArgumentParser, flag: _Flag, environ: Mapping[str, str]
) -> Any:
    text = environ.get(flag.variable)
    for name in flag.other_names:
        if text is None and name.startswith("--"):
            text = environ.get(name.removeprefix("--").replace("-", "_").upper())
    if text is None or (text == "" and flag.kind is not str):
        return None
    try:
        if flag.kind is None:
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        return flag.kind(text)
    except KeyError:
        parser.error(f"invalid value {text!r} in {flag.variable}: expected true or false")
    except ValueError as error:
        parser.error(f"invalid value {text!r} in the environment variable {flag.variable}: {error}")


def own_version() -> str:
    """The version of the installed distribution."""
    return version("kagami-tgi")
