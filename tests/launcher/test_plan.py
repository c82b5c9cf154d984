from pathlib import Path

import pytest

from kagami_launcher.cli import Invocation, parse
from kagami_launcher.model.source import ModelSource
from kagami_launcher.plan import (
    Devices,
    LaunchFailed,
    check,
    max_batch_prefill_tokens,
    plan_router,
    plan_shard,
    warnings,
)

SOURCE = ModelSource("org/name", Path("/models/x"))
CPU, GPU = Devices(0), Devices(1, "nvidia-h200")


def invocation(*argv: str, **environ: str) -> Invocation:
    return parse(argv, environ)


def router_argv(*argv: str) -> list[str]:
    return list(plan_router(invocation(*argv), SOURCE, CPU, prefill_tokens=512).argv)


def after(name: str, argv: list[str]) -> str:
    return argv[argv.index(name) + 1]


# launcher.md §3: flags -> the text inside Error: ArgumentValidation("…").
REFUSED = [
    (
        "--max-input-tokens 3 --max-input-length 4",
        "Both `max_input_tokens` (3) and `max_input_length` (4) are set. Please define only "
        "`max_input_tokens` as `max_input_length is deprecated for naming consistency.",
    ),
    (
        "--max-input-tokens 4 --max-total-tokens 4",
        "`max_input_tokens`(4) must be < `max_total_tokens`(4)",
    ),
    (
        "--max-input-length 5 --max-total-tokens 4",
        "`max_input_tokens`(5) must be < `max_total_tokens`(4)",
    ),
    ("--validation-workers 0", "`validation_workers` must be > 0"),
    (
        "--max-total-tokens 9 --max-batch-total-tokens 8",
        "`max_total_tokens` must be <= `max_batch_total_tokens`. Given: 9 and 8",
    ),
    ("--ngrok", "`ngrok-authtoken` must be set when using ngrok tunneling"),
    ("--ngrok --ngrok-authtoken x", "`ngrok-edge` must be set when using ngrok tunneling"),
    ("--num-shard 0", "`num_shard` cannot be < 1"),
    ("--sharded true --num-shard 1", "`sharded` is true but `num_shard` <= 1"),
    (
        "--num-shard 2 --quantize exl2",
        "Sharding is currently not supported with `exl2` quantization",
    ),
    ("--watermark-gamma 1", "`watermark_gamma` must be > 0 and < 1. Given: 1.0"),
    ("--cuda-memory-fraction 0", "`cuda_memory_fraction` must be in (0, 1]. Given: 0.0"),
    ("--ngrok --ngrok-authtoken x --ngrok-edge y", "--ngrok is not supported yet"),
    (
        "--quantize marlin",
        "--quantize marlin is not supported: its files are laid out for CUDA kernels; serve the "
        "model's gptq or awq checkpoint, or the unquantized one with --quantize int4",
    ),
    ("--speculate 2", "--speculate 2 is not supported yet"),
    ("--lora-adapters a/b", "--lora-adapters is not supported yet"),
    ("--sharded true --num-shard 0", "`sharded` is true but `num_shard` <= 1"),
    ("--sharded false --num-shard 0", "`num_shard` cannot be < 1"),
]


@pytest.mark.parametrize(("argv", "text"), REFUSED)
def test_what_cannot_be_is_refused_with_tgis_text(argv: str, text: str) -> None:
    with pytest.raises(LaunchFailed) as failure:
        check(invocation(*argv.split()).args, CPU)
    assert str(failure.value) == f'ArgumentValidation("{text}")'


def test_refusals_also_come_from_the_environment() -> None:
    with pytest.raises(LaunchFailed):
        check(invocation(QUANTIZE="exl2").args, CPU)


@pytest.mark.parametrize(
    "argv", ["", "--num-shard 1", "--sharded false", "--speculate 0", "--quantize int4"]
)
def test_what_can_be_is_let_through(argv: str) -> None:
    assert check(invocation(*argv.split()).args, CPU) == 1


@pytest.mark.parametrize(
    ("argv", "num_listed", "num_shard"),
    [
        ("", None, 1),
        ("", 0, 1),
        ("", 4, 4),
        ("--num-shard 3", None, 3),
        ("--num-shard 3", 8, 3),
        ("--sharded true", 2, 2),
        ("--sharded true --num-shard 3", 2, 3),
        ("--sharded false", 8, 1),
        ("--sharded false --num-shard 2", 8, 2),
    ],
)
def test_the_number_of_shards_follows_tgis_table(
    argv: str, num_listed: int | None, num_shard: int
) -> None:
    assert check(invocation(*argv.split()).args, Devices(0, "", num_listed)) == num_shard


@pytest.mark.parametrize(
    ("num_listed", "text"),
    [
        (1, "`sharded` is true but only found 1 CUDA devices"),
        (0, "`sharded` is true but only found 0 CUDA devices"),
        (
            None,
            "--num-shard and CUDA_VISIBLE_DEVICES/NVIDIA_VISIBLE_DEVICES/ZE_AFFINITY_MASK are "
            "not set",
        ),
    ],
)
def test_too_few_devices_for_sharding_are_refused(num_listed: int | None, text: str) -> None:
    with pytest.raises(LaunchFailed) as failure:
        check(invocation("--sharded", "true").args, Devices(0, "", num_listed))
    assert str(failure.value) == f'NotEnoughCUDADevices("{text}")'


UNUSED = {
    "--kv-cache-dtype": "fp8_e5m2",
    "--cuda-graphs": "0",
    "--master-addr": "x",
    "--master-port": "1",
    "--disable-custom-kernels": None,
    "--rope-scaling": "linear",
    "--rope-factor": "2",
    "--ngrok-authtoken": "x",
    "--ngrok-edge": "x",
    "--usage-stats": "off",
    "--enable-prefill-logprobs": None,
}


@pytest.mark.parametrize(("flag", "value"), UNUSED.items())
def test_a_flag_without_effect_says_so(flag: str, value: str | None) -> None:
    (line,) = warnings(invocation(flag, *([value] if value else [])), CPU, 1)
    assert line.startswith(f"`{flag}` has no effect: ")


def test_nothing_is_said_when_nothing_is_given() -> None:
    assert warnings(invocation(), CPU, 1) == []


def test_shards_need_to_know_where_they_meet() -> None:
    assert warnings(invocation("--master-addr", "x", "--master-port", "1"), CPU, 2) == []


def test_the_memory_fraction_has_no_effect_without_a_gpu() -> None:
    given = invocation("--cuda-memory-fraction", "0.5")
    assert len(warnings(given, CPU, 1)) == 1
    assert warnings(given, GPU, 1) == []


def test_remote_code_is_pointed_out() -> None:
    (line,) = warnings(invocation("--trust-remote-code", "--model-id", "a/b"), CPU, 1)
    assert line.startswith("`trust_remote_code` is set. Trusting that model `a/b` do not contain")


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
    )
    assert after("--max-input-tokens", argv) == "5"
    assert after("--max-total-tokens", argv) == "6"
    assert after("--waiting-served-ratio", argv) == "0.3"
    assert argv.count("--cors-allow-origin") == 2
    assert "--disable-grammar-support" in argv


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
