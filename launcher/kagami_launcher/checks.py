"""Which flags are refused, with TGI's texts, and which have no effect.

Pure: reads no file and no variable, starts nothing.
"""

from kagami_launcher.cli import Invocation, LauncherArgs, flags, option
from kagami_launcher.devices import Devices
from kagami_launcher.errors import LaunchFailed, NotSupported

_CUDA_LAYOUTS = ("exl2", "marlin")


def check(args: LauncherArgs, devices: Devices) -> int:
    """Refuse what contradicts itself, in TGI's order and words, then what is not supported.

    Returns the number of shards.
    """
    input_tokens = max_input_tokens(args)
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


def max_input_tokens(args: LauncherArgs) -> int | None:
    """The limit under either of its two names; refused where both are given."""
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
