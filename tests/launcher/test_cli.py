import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from kagami_launcher.cli import LauncherArgs, dump, flags, option, parse
from kagami_proto.flag_values import Real, Whole

# Flag, a value, what it becomes, the default.
TABLE = [
    ("model-id", "a/b", "a/b", "kagami/SmolLM2-135M-Instruct"),
    ("revision", "main", "main", None),
    ("validation-workers", "3", 3, 2),
    ("sharded", "false", False, None),
    ("num-shard", "1", 1, None),
    ("quantize", "compressed-tensors", "compressed-tensors", None),
    ("speculate", "2", 2, None),
    ("dtype", "float16", "float16", None),
    ("kv-cache-dtype", "fp8_e5m2", "fp8_e5m2", None),
    ("trust-remote-code", None, True, False),
    ("max-concurrent-requests", "7", 7, 128),
    ("max-best-of", "7", 7, 2),
    ("max-stop-sequences", "7", 7, 4),
    ("max-top-n-tokens", "7", 7, 5),
    ("max-input-tokens", "7", 7, None),
    ("max-input-length", "7", 7, None),
    ("max-total-tokens", "7", 7, None),
    ("waiting-served-ratio", "1.2", 1.2, 0.3),
    ("max-batch-prefill-tokens", "7", 7, None),
    ("max-batch-total-tokens", "7", 7, None),
    ("max-waiting-tokens", "7", 7, 20),
    ("max-batch-size", "7", 7, None),
    ("cuda-graphs", "1,2,4", (1, 2, 4), None),
    ("hostname", "127.0.0.1", "127.0.0.1", "0.0.0.0"),
    ("port", "80", 80, 3000),
    ("prometheus-port", "80", 80, 9000),
    ("shard-uds-path", "/tmp/x", "/tmp/x", "/tmp/text-generation-server"),
    ("master-addr", "there", "there", "localhost"),
    ("master-port", "7", 7, 29500),
    ("huggingface-hub-cache", "/data", "/data", None),
    ("weights-cache-override", "/data", "/data", None),
    ("disable-custom-kernels", None, True, False),
    ("cuda-memory-fraction", "0.5", 0.5, 1.0),
    ("rope-scaling", "dynamic", "dynamic", None),
    ("rope-factor", "2", 2.0, None),
    ("json-output", None, True, False),
    ("otlp-endpoint", "http://c:4317", "http://c:4317", None),
    ("otlp-service-name", "x", "x", "text-generation-inference.router"),
    ("cors-allow-origin", "https://a", ("https://a",), ()),
    ("api-key", "secret", "secret", None),
    ("watermark-gamma", "0.5", 0.5, None),
    ("watermark-delta", "2", 2.0, None),
    ("ngrok", None, True, False),
    ("ngrok-authtoken", "x", "x", None),
    ("ngrok-edge", "x", "x", None),
    ("tokenizer-config-path", "/x", "/x", None),
    ("disable-grammar-support", None, True, False),
    ("env", None, True, False),
    ("max-client-batch-size", "7", 7, 4),
    ("lora-adapters", "a/b,c/d", "a/b,c/d", None),
    ("usage-stats", "no-stack", "no-stack", "on"),
    ("payload-limit", "7", 7, 2_000_000),
    ("enable-prefill-logprobs", None, True, False),
    ("graceful-termination-timeout", "7", 7, 90),
    ("otlp-include-content", None, True, False),
    ("otlp-step-spans", None, True, False),
    ("header-timeout", "7", 7.0, 10.0),
    ("body-timeout", "7.5", 7.5, 30.0),
    ("keep-alive-timeout", "620", 620.0, 75.0),
    ("write-timeout", "7", 7.0, 60.0),
    ("caller-header", "x-forwarded-for", "x-forwarded-for", ""),
    ("tool-call-parser", "hermes", "hermes", None),
    ("reasoning-parser", "none", "none", None),
]


def value_of(name: str, argv: list[str], environ: dict[str, str] | None = None) -> object:
    return getattr(parse(argv, environ or {}).args, name.replace("-", "_"))


def test_the_table_names_every_flag_in_order() -> None:
    assert [name for name, *_ in TABLE] == [
        option(item.name).removeprefix("--") for item, _ in flags()
    ]


@pytest.mark.parametrize(("name", "value", "parsed", "default"), TABLE)
def test_a_flag_is_read_from_the_command_line(
    name: str, value: str | None, parsed: object, default: object
) -> None:
    assert value_of(name, []) == default
    assert value_of(name, [f"--{name}"] + ([value] if value else [])) == parsed
    if value:
        assert value_of(name, [f"--{name}={value}"]) == parsed


@pytest.mark.parametrize(("name", "value", "parsed"), [row[:3] for row in TABLE if row[0] != "env"])
def test_a_flag_is_read_from_the_environment(name: str, value: str | None, parsed: object) -> None:
    variable = name.upper().replace("-", "_")
    assert value_of(name, [], {variable: value or "true"}) == parsed


def test_the_command_line_wins_over_the_environment() -> None:
    assert value_of("port", ["-p", "1"], {"PORT": "2"}) == 1


def test_an_empty_variable_counts_as_not_set() -> None:
    assert value_of("num-shard", [], {"NUM_SHARD": ""}) is None


def test_env_has_no_variable() -> None:
    assert value_of("env", [], {"ENV": "production"}) is False


def test_a_switch_can_be_off_in_the_environment() -> None:
    assert value_of("json-output", [], {"JSON_OUTPUT": "false"}) is False


def test_short_flags() -> None:
    args = parse(["-p", "80", "-e", "-g", "5"], {}).args
    assert (args.port, args.env, args.graceful_termination_timeout) == (80, True, 5)


def test_an_origin_may_be_repeated() -> None:
    argv = ["--cors-allow-origin", "a", "--cors-allow-origin", "b"]
    assert value_of("cors-allow-origin", argv) == ("a", "b")


def test_what_was_given_is_known() -> None:
    assert parse(["--port", "3000"], {"QUANTIZE": "awq"}).given == {"port", "quantize"}


def test_dtype_takes_float32() -> None:
    assert value_of("dtype", ["--dtype", "float32"]) == "float32"


@pytest.mark.parametrize(
    ("argv", "environ"),
    [
        (["--nonsense"], {}),
        (["--num_shard", "1"], {}),
        (["--max-best", "1"], {}),  # no abbreviations
        (["--json-output", "true"], {}),
        (["--port", "65536"], {}),
        (["--port", "-1"], {}),
        (["--port", "八十"], {}),
        (["--max-best-of", "2.5"], {}),
        (["--waiting-served-ratio", "inf"], {}),
        (["--payload-limit", "0"], {}),
        (["--header-timeout", "0"], {}),
        (["--write-timeout", "-1"], {}),
        ([], {"BODY_TIMEOUT": "nan"}),
        ([], {"KEEP_ALIVE_TIMEOUT": "inf"}),
        (["--dtype", "int8"], {}),
        (["--sharded", "yes"], {}),
        (["--port"], {}),
        ([], {"JSON_OUTPUT": "1"}),
        ([], {"QUANTIZE": "int3"}),
        ([], {"CUDA_GRAPHS": "1,,2"}),
        ([], {"KAGAMI_STARTUP_TIMEOUT": "soon"}),
    ],
)
def test_a_usage_error_is_one_line_and_exit_2(
    argv: list[str], environ: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        parse(argv, environ)
    assert stop.value.code == 2
    stderr = capsys.readouterr().err
    assert stderr.startswith("error: ")
    assert stderr.count("\n") == 1


def test_an_error_names_the_variable(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse([], {"DTYPE": "int8"})
    assert capsys.readouterr().err.startswith(
        "error: invalid value 'int8' for --dtype (environment variable DTYPE): "
        "expected one of float16, bfloat16, float32"
    )


@pytest.mark.parametrize("flag", ["--help", "-h", "--version", "-V"])
def test_help_and_version_import_nothing_heavy(flag: str) -> None:
    program = (
        "import sys, atexit\n"
        f"sys.argv = ['launcher', {flag!r}]\n"
        "heavy = {'grpc', 'torch', 'gguf', 'numpy', 'tokenizers', 'asyncio'}\n"
        "atexit.register(lambda: sys.stderr.write(str(sorted(heavy & set(sys.modules)))))\n"
        "from kagami_launcher.__main__ import main\n"
        "main()\n"
    )
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "[]")
    assert done.stdout.startswith(("usage: ", "text-generation-launcher "))
    assert time.monotonic() - started < 3  # 0.1 s on an idle machine


@pytest.mark.parametrize("name", ["127.0.0.1", "::1", "localhost", "inside.example.com"])
def test_a_hostname_is_taken_as_given(name: str) -> None:
    assert value_of("hostname", ["--hostname", name]) == name
    assert value_of("hostname", [], {"HOSTNAME": name}) == name


def test_the_variable_with_the_containers_own_name_means_every_address() -> None:
    own = socket.gethostname()
    assert value_of("hostname", [], {"HOSTNAME": own}) == "0.0.0.0"
    assert value_of("hostname", ["--hostname", own], {"HOSTNAME": own}) == own


def test_the_dump_has_the_form_of_rust() -> None:
    args = LauncherArgs(
        model_id='a "quoted" \\ name',
        huggingface_hub_cache="/data",
        quantize="bitsandbytes-nf4",
        dtype="bfloat16",
        kv_cache_dtype="fp8_e4m3fn",
        sharded=True,
        cuda_graphs=(1, 2),
        cors_allow_origin=("https://a",),
        api_key="secret",
        usage_stats="no-stack",
        rope_factor=2.0,
    )
    assert dump(args) == GOLDEN


def test_the_log_level_is_info_unless_said() -> None:
    assert parse([], {}).log_level == "info"
    assert parse([], {"LOG_LEVEL": "debug"}).log_level == "debug"


def test_the_startup_time_out_can_be_set() -> None:
    assert parse([], {}).startup_timeout_s == 1800
    assert parse([], {"KAGAMI_STARTUP_TIMEOUT": "5"}).startup_timeout_s == 5


def test_every_flag_has_a_help_text() -> None:
    assert all(flag.help for _, flag in flags())


def test_the_readme_has_a_row_for_every_flag() -> None:
    readme = Path(__file__).parents[2] / "launcher" / "README.md"
    rows = [line for line in readme.read_text().splitlines() if line.startswith("| `-")]
    assert len(rows) == len(TABLE)
    for row, (item, flag) in zip(rows, flags(), strict=True):
        name, variable, default, effect = [cell.strip() for cell in row.strip("|").split("|")]
        assert name.endswith(f"`{option(item.name)}`")
        assert variable == (f"`{item.name.upper()}`" if flag.in_environment else "-")
        assert default in (f"`{item.default}`", "none", "off", "any origin")
        assert (effect == f"none (WARN): {flag.unused}") == bool(flag.unused)


GOLDEN = r"""Args {
    model_id: "a \"quoted\" \\ name",
    revision: None,
    validation_workers: 2,
    sharded: Some(
        true,
    ),
    num_shard: None,
    quantize: Some(
        BitsandbytesNf4,
    ),
    speculate: None,
    dtype: Some(
        BFloat16,
    ),
    kv_cache_dtype: Some(
        Fp8e4m3fn,
    ),
    trust_remote_code: false,
    max_concurrent_requests: 128,
    max_best_of: 2,
    max_stop_sequences: 4,
    max_top_n_tokens: 5,
    max_input_tokens: None,
    max_input_length: None,
    max_total_tokens: None,
    waiting_served_ratio: 0.3,
    max_batch_prefill_tokens: None,
    max_batch_total_tokens: None,
    max_waiting_tokens: 20,
    max_batch_size: None,
    cuda_graphs: Some(
        [
            1,
            2,
        ],
    ),
    hostname: "0.0.0.0",
    port: 3000,
    prometheus_port: 9000,
    shard_uds_path: "/tmp/text-generation-server",
    master_addr: "localhost",
    master_port: 29500,
    huggingface_hub_cache: Some(
        "/data",
    ),
    weights_cache_override: None,
    disable_custom_kernels: false,
    cuda_memory_fraction: 1.0,
    rope_scaling: None,
    rope_factor: Some(
        2.0,
    ),
    json_output: false,
    otlp_endpoint: None,
    otlp_service_name: "text-generation-inference.router",
    cors_allow_origin: [
        "https://a",
    ],
    api_key: Some(
        "***",
    ),
    watermark_gamma: None,
    watermark_delta: None,
    ngrok: false,
    ngrok_authtoken: None,
    ngrok_edge: None,
    tokenizer_config_path: None,
    disable_grammar_support: false,
    env: false,
    max_client_batch_size: 4,
    lora_adapters: None,
    usage_stats: NoStack,
    payload_limit: 2000000,
    enable_prefill_logprobs: false,
    graceful_termination_timeout: 90,
    otlp_include_content: false,
    otlp_step_spans: false,
    header_timeout: 10.0,
    body_timeout: 30.0,
    keep_alive_timeout: 75.0,
    write_timeout: 60.0,
    caller_header: "",
    tool_call_parser: None,
    reasoning_parser: None,
}"""


NUMBERS = [
    item.name for item, flag in flags() if isinstance(flag.parse, Whole | Real) and not flag.unused
]


@pytest.mark.parametrize("value", ["nan", "inf", "1e999", str(2**32), str(2**64), "9" * 5000])
@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_out_of_range_is_refused_at_the_command_line(
    name: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for argv, environ in (([f"{option(name)}={value}"], {}), ([], {name.upper(): value})):
        with pytest.raises(SystemExit, match="2"):
            parse(argv, environ)
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert option(name) in error
        assert "expected a" in error
