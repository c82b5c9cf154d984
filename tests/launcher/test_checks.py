import pytest

from kagami_launcher.checks import check, warnings
from kagami_launcher.cli import Invocation, parse
from kagami_launcher.devices import Devices
from kagami_launcher.errors import LaunchFailed

CPU, GPU = Devices(0), Devices(1, "nvidia-h200")


def invocation(*argv: str, **environ: str) -> Invocation:
    return parse(argv, environ)


# Flags -> the text inside Error: ArgumentValidation("…").
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
