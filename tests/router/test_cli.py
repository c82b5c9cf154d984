import socket
import subprocess
import sys

import pytest

from kagami_proto.flag_values import Real, Whole
from kagami_router.cli import _FLAGS, _Flag, parse

TIMEOUTS = ("header", "body", "keep-alive", "write")


def test_defaults_are_tgis() -> None:
    args = parse([], {})
    assert args.port == 3000
    assert args.hostname == "0.0.0.0"
    assert args.max_concurrent_requests == 128
    assert (args.max_best_of, args.max_stop_sequences, args.max_top_n_tokens) == (2, 4, 5)
    assert args.max_client_batch_size == 4
    assert args.max_batch_prefill_tokens == 4096
    assert args.payload_limit == 2_000_000
    assert args.master_shard_uds_path == "/tmp/text-generation-server-0"
    assert args.prometheus_port is None
    assert args.without_effect == ()


def test_the_time_limits_have_defaults_and_variables() -> None:
    fields = ("header_timeout", "body_timeout", "keep_alive_timeout", "write_timeout")
    assert [getattr(parse([], {}), name) for name in fields] == [10, 30, 75, 60]
    environ = {f"{name.upper().replace('-', '_')}_TIMEOUT": "0.5" for name in TIMEOUTS}
    assert [getattr(parse([], environ), name) for name in fields] == [0.5] * 4


def test_flag_before_environment_before_default() -> None:
    environ = {"PORT": "80", "MAX_BEST_OF": "3"}
    args = parse(["--port", "8080"], environ)
    assert (args.port, args.max_best_of, args.max_stop_sequences) == (8080, 3, 4)


def test_the_variable_with_the_containers_own_name_means_every_address() -> None:
    own = socket.gethostname()
    assert parse([], {"HOSTNAME": own}).hostname == "0.0.0.0"
    assert parse([], {"HOSTNAME": ""}).hostname == "0.0.0.0"
    assert parse(["--hostname", own], {"HOSTNAME": own}).hostname == own
    assert parse([], {"HOSTNAME": "localhost"}).hostname == "localhost"


@pytest.mark.parametrize("name", ["--max-input-tokens", "--max-input-length"])
def test_both_names_of_the_input_limit(name: str) -> None:
    assert parse([name, "5"], {}).max_input_tokens == 5
    assert parse([f"{name}=5"], {}).max_input_tokens == 5
    variable = name.removeprefix("--").replace("-", "_").upper()
    assert parse([], {variable: "5"}).max_input_tokens == 5


@pytest.mark.parametrize(("text", "expected"), [("true", True), ("false", False), ("", False)])
def test_switches_take_true_and_false_from_the_environment(text: str, expected: bool) -> None:
    assert parse([], {"JSON_OUTPUT": text}).json_output is expected


def test_origins_repeat() -> None:
    args = parse(["--cors-allow-origin", "a", "--cors-allow-origin", "b"], {})
    assert args.cors_allow_origin == ("a", "b")
    assert parse([], {"CORS_ALLOW_ORIGIN": "*"}).cors_allow_origin == ()


def test_the_key_comes_from_the_environment() -> None:
    assert parse([], {"API_KEY": "k"}).api_key == "k"


def test_flags_without_effect_are_named() -> None:
    args = parse(["--revision", "main", "--usage-stats", "off", "--ngrok"], {})
    assert args.without_effect == ("--revision", "--usage-stats", "--ngrok")


@pytest.mark.parametrize(
    "argv",
    [
        ["--nothing"],
        ["--port", "x"],
        ["--port", "70000"],
        ["--max-best-of", "-1"],
        ["--max-best"],
        ["--payload-limit", "0"],
        *([f"--{name}-timeout", value] for name in TIMEOUTS for value in ("0", "-1", "inf", "nan")),
    ],
)
def test_what_is_not_understood_is_one_line_and_exit_code_2(
    argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as left:
        parse(argv, {})
    assert left.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_bad_variable_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse([], {"PORT": "x"})
    assert "environment variable PORT" in capsys.readouterr().err


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from kagami_router.cli import parse\n"
        "try: parse(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'aiohttp', 'grpc', 'tokenizers', 'jinja2', 'msgspec'} & set(sys.modules)\n"
        "sys.exit(f'{heavy}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--max-concurrent-requests" in done.stdout


@pytest.mark.parametrize("value", ["-1", "nan", "inf", "1e999", str(2**32), str(2**64), "9" * 5000])
@pytest.mark.parametrize("flag", [flag for flag in _FLAGS if isinstance(flag.kind, Whole | Real)])
def test_a_number_out_of_range_is_refused_at_the_command_line(
    flag: _Flag, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for argv, environ in (([f"{flag.name}={value}"], {}), ([], {flag.variable: value})):
        with pytest.raises(SystemExit, match="2"):
            parse(argv, environ)
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert flag.name in error or flag.variable in error
        assert "expected a" in error
