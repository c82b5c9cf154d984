"""Quantized checkpoints as their tools write them. Plain loops pack them, as the formats say.

Each packer takes a matrix `[out, in]`, and gives the tensors of its module and the matrix that
they stand for.
"""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Tensors = dict[str, Tensor]
Packer = Callable[[Tensor], tuple[Tensors, Tensor]]

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight outputs lies in a word's first nibble, second, …"""


def round_to_groups(
    weight: Tensor, group_of: Tensor, bits: int, *, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes `[out, in]`, float16 scales and zeros `[out, groups]`, and what they stand for."""
    top = (1 << bits) - 1
    num_groups = int(group_of.max()) + 1
    scales, zeros = torch.empty(2, weight.shape[0], num_groups)
    for group in range(num_groups):
        part = weight[:, group_of == group]
        low, high = part.amin(1).clamp(max=0), part.amax(1).clamp(min=0)
        if symmetric:
            high = torch.maximum(-low, high)
            low = -high
        scales[:, group] = ((high - low) / top).half().float()
        zeros[:, group] = (-low / scales[:, group]).round().clamp(1, top)
    if symmetric:
        zeros.fill_(1 << (bits - 1))
    index = group_of.long()
    codes = (weight / scales[:, index] + zeros[:, index]).round().clamp(0, top)
    exact = (codes - zeros[:, index]) * scales[:, index]
    return codes.int(), scales.half(), zeros.int(), exact


def pack(codes: Tensor, bits: int, order: tuple[int, ...] | None = None) -> Tensor:
    """int32 words along the last dimension, the first code lowest; `order` within a word."""
    per_word = 32 // bits
    missing = -codes.shape[-1] % per_word
    codes = torch.nn.functional.pad(codes, (0, missing)).long()
    words = torch.zeros(*codes.shape[:-1], codes.shape[-1] // per_word, dtype=torch.long)
    for place in range(per_word):
        which = order[place] if order else place
        words |= codes[..., which::per_word] << (bits * place)
    return (words - ((words >> 31) << 32)).int()


def gptq(
    bits: int = 4, group: int = 16, *, symmetric: bool, act_order: bool = False, v2: bool = False
) -> Packer:
    def packer(weight: Tensor) -> tuple[Tensors, Tensor]:
        num_columns = weight.shape[1]
        group_of = torch.arange(num_columns) // (group if group > 0 else num_columns)
        if act_order:
            shuffled = torch.randperm(num_columns, generator=torch.Generator().manual_seed(3))
            group_of = group_of[shuffled]
        codes, scales, zeros, exact = round_to_groups(weight, group_of, bits, symmetric=symmetric)
        stored = zeros.t() if v2 else zeros.t() - 1
        tensors = {
            "qweight": pack(codes, bits).t().contiguous(),
            "qzeros": pack(stored, bits),
            "scales": scales.t().contiguous(),
            "g_idx": group_of.int(),
        }
        return tensors, exact

    return packer


def awq(group: int = 16) -> Packer:
    def packer(weight: Tensor) -> tuple[Tensors, Tensor]:
        group_of = torch.arange(weight.shape[1]) // group
        codes, scales, zeros, exact = round_to_groups(weight, group_of, 4, symmetric=False)
        tensors = {
            "qweight": pack(codes.t(), 4, AWQ_ORDER),
            "qzeros": pack(zeros.t(), 4, AWQ_ORDER),
            "scales": scales.t().contiguous(),
        }
        return tensors, exact

    return packer


def packed_tensors(
    bits: int = 4, group: int = 16, *, symmetric: bool, act_order: bool = False
) -> Packer:
    """compressed-tensors' `pack-quantized`."""

    def packer(weight: Tensor) -> tuple[Tensors, Tensor]:
        num_columns = weight.shape[1]
        group_of = torch.arange(num_columns) // (group if group > 0 else num_columns)
        if act_order:
            group_of = group_of.flip(0)
        codes, scales, zeros, exact = round_to_groups(weight, group_of, bits, symmetric=symmetric)
        tensors = {
            "weight_packed": pack(codes, bits),
            "weight_scale": scales,
            "weight_shape": torch.tensor(weight.shape),
        }
        if not symmetric:
            tensors["weight_zero_point"] = pack(zeros.t(), bits).t().contiguous()
        if act_order:
            tensors["weight_g_idx"] = group_of.int()
        return tensors, exact

    return packer


def int8_channels(weight: Tensor) -> tuple[Tensors, Tensor]:
    """compressed-tensors' `int-quantized`."""
    scales = (weight.abs().amax(1, keepdim=True) / 127).bfloat16()
    values = (weight / scales.float()).round().clamp(-128, 127)
    return {"weight": values.to(torch.int8), "weight_scale": scales}, values * scales.float()


def fp8(block: int | None = None, *, per: str = "row", scale: str = "weight_scale") -> Packer:
    """e4m3 with a scale per "row" or "matrix", or per `block` x `block`."""

    def packer(weight: Tensor) -> tuple[Tensors, Tensor]:
        rows, columns = weight.shape
        if block is not None:
            spans = [
                [weight[i : i + block, j : j + block].abs().max() for j in range(0, columns, block)]
                for i in range(0, rows, block)
            ]
            scales = torch.tensor(spans) / 448
            each = scales.repeat_interleave(block, 0).repeat_interleave(block, 1)[:rows, :columns]
        else:
            largest = weight.abs().amax(1, keepdim=True) if per == "row" else weight.abs().max()
            scales = each = largest / 448
        values = (weight / each).to(torch.float8_e4m3fn)
        tensors = {"weight": values, scale: scales, "input_scale": torch.tensor(0.5)}
        return tensors, values.float() * each

    return packer


def quantize_folder(folder: Path, target: Path, packer: Packer, config: dict[str, object]) -> Path:
    """The model of `folder` with its layers' matrices packed; config.json says `config` of it."""
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if "_proj.weight" in name]:
        module = name.removesuffix(".weight")
        packed, _ = packer(tensors.pop(name).float())
        tensors |= {f"{module}.{suffix}": tensor for suffix, tensor in packed.items()}
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    model_config = json.loads((folder / "config.json").read_text())
    model_config["quantization_config"] = config
    (target / "config.json").write_text(json.dumps(model_config))
    return target
