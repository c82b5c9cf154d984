"""`python -m tests.shard.hostile_loads CACHE FOLDER COUNT [KIND]...` loads mutants of models.

In a process of its own, because what is looked for may end it. A line for each mutant: its kind and
number, the seconds, then "served", "refused" with the reason, or "raised" with what nobody expects.
"""

import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tests.fakes import quantized
from tests.fakes.model_folders import CONFIG, Folder, mutant, tensors, write_model
from torch import Tensor

from kagami_proto.errors import KagamiError
from kagami_shard.backends.native.select import Native
from kagami_shard.backends.select import load_backend
from kagami_shard.engine.engine import Engine
from kagami_shard.engine.warmup import WarmupLimits
from kagami_shard.machine.distributed import Alone
from kagami_shard.models.eos import eos_token_ids
from kagami_shard.weights.finite import why_not_finite

_GPT2: Mapping[str, Any] = {
    "model_type": "gpt2", "n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 32,
    "n_positions": 64, "n_inner": 32, "layer_norm_epsilon": 1e-5,
}  # fmt: skip


def _quantized(pack: quantized.Packer, config: Mapping[str, Any]) -> Folder:
    weights: dict[str, Tensor] = {}
    for name, tensor in tensors().items():
        if not name.endswith("_proj.weight"):
            weights[name] = tensor
            continue
        packed, _ = pack(tensor)
        module = name.removesuffix(".weight")
        weights |= {f"{module}.{suffix}": part for suffix, part in packed.items()}
    return Folder({**CONFIG, "quantization_config": dict(config)}, weights)


def _gpt2() -> Folder:
    def of(*shape: int) -> Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) / 4

    weights = {"transformer.wte.weight": of(32, 16), "transformer.wpe.weight": of(64, 16)}
    for name in (
        "transformer.ln_f",
        *(f"transformer.h.{i}.ln_{j}" for i in (0, 1) for j in (1, 2)),
    ):
        weights |= {f"{name}.weight": of(16), f"{name}.bias": of(16)}
    for i in (0, 1):
        for name, shape in {"attn.c_attn": (16, 48), "attn.c_proj": (16, 16),
                            "mlp.c_fc": (16, 32), "mlp.c_proj": (32, 16)}.items():  # fmt: skip
            layer = f"transformer.h.{i}.{name}"
            weights |= {f"{layer}.weight": of(*shape), f"{layer}.bias": of(shape[1])}
    return Folder(dict(_GPT2), weights)


_CT = {"quant_method": "compressed-tensors", "config_groups": {"g": {"weights": {
    "type": "int", "num_bits": 4}}}}  # fmt: skip
KINDS: Mapping[str, tuple[Callable[[], Folder], dict[str, Any]]] = {
    "float32": (lambda: Folder(dict(CONFIG), tensors()), {"dtype": torch.float32}),
    "bfloat16": (lambda: Folder(dict(CONFIG), tensors(torch.bfloat16)), {}),
    "tied": (
        lambda: Folder({**CONFIG, "tie_word_embeddings": True}, tensors(tied=True)),
        {},
    ),
    "biases": (lambda: Folder({**CONFIG, "model_type": "qwen2"}, _with_biases()), {}),
    "int8": (lambda: Folder(dict(CONFIG), tensors()), {"quantize": "int8"}),
    "int4": (lambda: Folder(dict(CONFIG), tensors()), {"quantize": "int4"}),
    "gptq": (
        partial(
            _quantized,
            quantized.gptq(symmetric=False),
            {"quant_method": "gptq", "bits": 4, "group_size": 16},
        ),
        {},
    ),
    "awq": (
        partial(_quantized, quantized.awq(), {"quant_method": "awq", "bits": 4, "group_size": 16}),
        {},
    ),
    "compressed-tensors": (
        partial(_quantized, quantized.packed_tensors(symmetric=False, act_order=True), _CT),
        {},
    ),
    "fp8": (
        partial(
            _quantized,
            quantized.fp8(16, scale="weight_scale_inv"),
            {"quant_method": "fp8", "weight_block_size": [16, 16]},
        ),
        {},
    ),
    "transformers": (_gpt2, {"dtype": torch.float32}),
}
"""How a sound model is made, and loaded"""


def _with_biases() -> dict[str, Tensor]:
    biases = {
        name.replace(".weight", ".bias"): torch.randn(len(tensor))
        for name, tensor in tensors().items()
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight"))
    }
    return tensors() | biases


def start(folder: Path, cache: Path, options: Mapping[str, Any]) -> None:
    """What a shard does until it is healthy; raises `KagamiError` where it refuses."""
    dtype = options.get("dtype", torch.bfloat16)
    backend, _ = load_backend(
        folder,
        dtype=dtype,
        device=torch.device("cpu"),
        trust_remote_code=False,
        max_length=0,
        parallel=Alone(),
        quantize=options.get("quantize"),
        memory_fraction=1.0,
        native=Native(cache, 2),
    )
    eos_token_ids(folder)
    engine = Engine(backend, block_size=8, why_not_finite=lambda: why_not_finite(folder, dtype))
    engine.warmup(WarmupLimits(16, 4, 32, 256))


def attempt(folder: Path, cache: Path, options: Mapping[str, Any]) -> str:
    """What came of it, in words."""
    try:
        start(folder, cache, options)
    except KagamiError as error:
        return f"refused {error}"
    # The parent says what it was.
    except Exception as error:
        return f"raised {type(error).__name__} {error!r}"
    return "served"


def main() -> None:
    cache, folder, count = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    for kind in sys.argv[4:] or KINDS:
        sound, options = KINDS[kind]
        folder_of = [sound(), *(mutant(number, *sound()) for number in range(1, count + 1))]
        for number, made in enumerate(folder_of):
            write_model(folder, made.config, made.weights)
            sys.stdout.write(f"{kind} {number} ")
            sys.stdout.flush()  # so that the parent knows which one ended the process
            started = time.monotonic()
            word = attempt(folder, cache, options)
            sys.stdout.write(f"{time.monotonic() - started:.1f} {word}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
