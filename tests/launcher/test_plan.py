from pathlib import Path

import pytest

from kagami_launcher.cli import Invocation, parse
from kagami_launcher.devices import Devices
from kagami_launcher.model.source import ModelSource
from kagami_launcher.plan import max_batch_prefill_tokens, plan_router, plan_shard

SOURCE = ModelSource("org/name", Path("/models/x"))
CPU, GPU = Devices(0), Devices(1, "nvidia-h200")


def invocation(*argv: str, **environ: str) -> Invocation:
    return parse(argv, environ)


def router_argv(*argv: str) -> list[str]:
    return list(plan_router(invocation(*argv), SOURCE, CPU, prefill_tokens=512).argv)


def after(name: str, argv: list[str]) -> str:
    return argv[argv.index(name) + 1]


@pytest.mark.parametrize(
    ("argv", "devices", "positions", "tokens"),
    [
        ("", GPU, None, 4096),
        ("", CPU, None, 256),
        ("", CPU, 8192, 256),
        ("", GPU, 1024, 1024),
        ("", CPU, 64, 64),
        ("--max-batch-total-tokens 100", CPU, 8192, 100),
        ("--max-batch-prefill-tokens 9000", CPU, 64, 9000),
    ],
)
def test_the_prefill_budget_fits_device_and_model(
    argv: str, devices: Devices, positions: int | None, tokens: int
) -> None:
    args = invocation(*argv.split()).args
    assert max_batch_prefill_tokens(args, devices, positions) == tokens


def test_the_shards_command_line() -> None:
    given = invocation("--shard-uds-path", "/tmp/s", "--dtype", "float32", "--trust-remote-code")
    shard = plan_shard(given, SOURCE, log_level="INFO")
    assert shard.argv == (
        *("text-generation-server", "serve", "/models/x", "--uds-path", "/tmp/s"),
        *("--logger-level", "INFO", "--json-output", "--dtype", "float32", "--trust-remote-code"),
    )
    assert shard.socket == "/tmp/s-0"


def test_a_relative_socket_is_made_absolute_for_everyone() -> None:
    prefix = str(Path.cwd() / "folder" / "s")
    shard = plan_shard(invocation("--shard-uds-path", "folder/s"), SOURCE, log_level="INFO")
    assert after("--uds-path", list(shard.argv)) == prefix
    assert shard.socket == f"{prefix}-0"
    assert after("--master-shard-uds-path", router_argv("--shard-uds-path", "folder/s")) == (
        f"{prefix}-0"
    )


def test_the_shards_environment() -> None:
    given = invocation("--cuda-memory-fraction", "0.5", "--huggingface-hub-cache", "/data")
    assert plan_shard(given, SOURCE, log_level="INFO").environment == {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "29500",
        "CUDA_MEMORY_FRACTION": "0.5",
        "HUGGINGFACE_HUB_CACHE": "/data",
    }


def test_what_the_user_gave_of_watermarks_reaches_the_shard() -> None:
    given = invocation("--watermark-gamma", "0.25", "--watermark-delta", "3")
    environment = plan_shard(given, SOURCE, log_level="INFO").environment
    assert environment["WATERMARK_GAMMA"] == "0.25"
    assert environment["WATERMARK_DELTA"] == "3"


def test_one_shard_of_several_knows_its_place() -> None:
    given = invocation("--master-addr", "10.0.0.1", "--master-port", "5")
    shard = plan_shard(given, SOURCE, log_level="INFO", rank=1, num_shard=3)
    assert shard.socket == "/tmp/text-generation-server-1"
    assert shard.argv[-1] == "--sharded"
    assert {
        "RANK": "1",
        "WORLD_SIZE": "3",
        "MASTER_ADDR": "10.0.0.1",
        "MASTER_PORT": "5",
    }.items() <= shard.environment.items()


def test_the_router_learns_folder_name_and_socket() -> None:
    argv = router_argv("--shard-uds-path", "/tmp/s", "--port", "80")
    assert argv[0] == "text-generation-router"
    assert after("--tokenizer-name", argv) == "/models/x"
    assert after("--served-model-name", argv) == "org/name"
    assert after("--master-shard-uds-path", argv) == "/tmp/s-0"
    assert after("--port", argv) == "80"
    assert after("--max-batch-prefill-tokens", argv) == "512"
    assert "--json-output" in argv


def test_what_was_not_given_is_left_to_the_router() -> None:
    assert not {
        "--max-input-tokens",
        "--max-total-tokens",
        "--max-batch-total-tokens",
        "--max-batch-size",
        "--waiting-served-ratio",
        "--max-waiting-tokens",
        "--prometheus-port",
    } & set(router_argv())


def test_what_was_given_reaches_the_router() -> None:
    argv = router_argv(
        *("--max-input-length", "5", "--max-total-tokens", "6", "--waiting-served-ratio", "0.3"),
        *("--cors-allow-origin", "a", "--cors-allow-origin", "b", "--disable-grammar-support"),
        *("--tool-call-parser", "hermes", "--reasoning-parser", "none"),
    )
    assert after("--max-input-tokens", argv) == "5"
    assert after("--max-total-tokens", argv) == "6"
    assert after("--waiting-served-ratio", argv) == "0.3"
    assert argv.count("--cors-allow-origin") == 2
    assert "--disable-grammar-support" in argv
    assert argv[argv.index("--tool-call-parser") + 1] == "hermes"
    assert argv[argv.index("--reasoning-parser") + 1] == "none"


@pytest.mark.parametrize("name", ["header", "body", "keep-alive", "write"])
def test_the_time_limits_of_connections_reach_the_router(name: str) -> None:
    assert float(after(f"--{name}-timeout", router_argv(f"--{name}-timeout", "7.5"))) == 7.5


def test_the_router_has_time_to_tell_those_it_cuts_off() -> None:
    assert after("--graceful-termination-timeout", router_argv()) == "88"
    assert after("--graceful-termination-timeout", router_argv("-g", "2")) == "1.5"


def test_the_api_key_is_not_in_anybodys_command_line() -> None:
    given = invocation("--api-key", "secret")
    router = plan_router(given, SOURCE, CPU, prefill_tokens=1)
    shard = plan_shard(given, SOURCE, log_level="INFO")
    assert "secret" not in router.argv + shard.argv
    assert router.environment["API_KEY"] == "secret"
    assert "secret" not in shard.environment.values()


def test_the_compute_type_is_the_operators_or_the_devices() -> None:
    named = plan_router(invocation(COMPUTE_TYPE="x"), SOURCE, GPU, prefill_tokens=1)
    found = plan_router(invocation(), SOURCE, GPU, prefill_tokens=1)
    assert named.environment["COMPUTE_TYPE"] == "x"
    assert found.environment["COMPUTE_TYPE"] == "1-nvidia-h200"
    assert CPU.compute_type(2) == "2-cpu"
