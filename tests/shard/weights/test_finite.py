"""A weight that is NaN or infinite keeps a shard from becoming healthy, and is named."""

import os
from pathlib import Path

import pytest
import torch
from tests.fakes.model_folders import CONFIG, tensors, write_model
from tests.shard.hostile_loads import KINDS, attempt

from kagami_shard import cli
from kagami_shard.weights.finite import is_finite

NAN, INFINITY = float("nan"), float("inf")
UNREAD = "input_scale"
"""Of an fp8 checkpoint: activations are not quantized"""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [NAN, INFINITY, -INFINITY])
def test_one_value_that_is_no_number_is_found_wherever_it_is(
    value: float, kind: str, tmp_path: Path
) -> None:
    cache = cli.cache_folder(os.environ)
    sound, options = KINDS[kind]
    config, weights = sound()
    missed = {}
    for name, tensor in weights.items():
        spoilt = tensor.float().flatten().clone()
        spoilt[len(spoilt) // 2] = value
        changed = spoilt.reshape(tensor.shape).to(tensor.dtype)
        if "layers.0." in name or "h.0." in name:
            continue  # as those of the next layer
        if changed.float().isfinite().all() or name.endswith(UNREAD):
            continue
        write_model(tmp_path / "model", config, weights | {name: changed})
        outcome = attempt(tmp_path / "model", cache, options)
        if not outcome.startswith("refused") or f"{name} is {float(value)} at [" not in outcome:
            missed[name] = outcome
    assert missed == {}


def test_finite_weights_that_overflow_are_told_apart(tmp_path: Path) -> None:
    weights = tensors()
    for layer in (0, 1):
        for name in ("up_proj", "gate_proj"):
            weights[f"model.layers.{layer}.mlp.{name}.weight"] *= 1e30
    write_model(tmp_path, CONFIG, weights)
    outcome = attempt(tmp_path, cli.cache_folder(os.environ), {"dtype": torch.float32})
    assert (
        "all weights are finite, but what the model computes of them in float32 is not" in outcome
    )


@pytest.mark.parametrize(
    ("values", "dtype", "expected"),
    [
        ([], torch.float32, True),
        ([1.0, -3e38], torch.bfloat16, True),
        ([1.0, 7e4], torch.float16, False),
        ([1.0, -7e4], torch.float16, False),
        ([1.0, 6e4], torch.float16, True),
        ([NAN, 1.0], torch.float32, False),
        ([1.0, -INFINITY], torch.float32, False),
    ],
)
def test_finite_is_what_the_models_dtype_holds(
    values: list[float], dtype: torch.dtype, expected: bool
) -> None:
    assert is_finite(torch.tensor(values), dtype) is expected
    assert is_finite(torch.tensor(values, dtype=torch.float64), dtype) is expected
