"""Weights in 8 and 4 bits in the library against their torch forms, over random shapes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.shard.native.test_ops import Program, Weights, is_near, prompt, quick, seeds, sizes
from torch import Tensor

from kagami_shard.layers.embedding import Head
from kagami_shard.layers.linear import QuantizedLinear
from kagami_shard.layers.mlp import ACTIVATIONS, GatedMLP
from kagami_shard.layers.norm import Rounding, no_norm
from kagami_shard.models.ops import Ops
from kagami_shard.native.runtime import Runtime
from kagami_shard.quantization.base import Groups, Weight
from kagami_shard.quantization.fp8 import quantize_fp8
from kagami_shard.quantization.grouped import GroupedWeight, make_grouped
from kagami_shard.quantization.int4 import quantize_int4
from kagami_shard.quantization.int8 import Int8Weight, quantize_int8


def not_turned(matrix: Tensor) -> Int8Weight:
    scales = matrix.float().abs().amax(1) / 127
    values = (matrix.float() / scales[:, None]).round().to(torch.int8)
    return Int8Weight(values, scales)


def shuffled(matrix: Tensor) -> GroupedWeight:
    """Groups of columns that are no neighbours, which the library does not read."""
    weight = quantize_int4(matrix)
    of_column = (torch.arange(matrix.shape[1]) % weight.scales.shape[1]).int()
    groups = Groups(matrix.shape[1], 32, of_column)
    return make_grouped(4, weight.codes(), weight.scales, weight.zeros, groups)


QUANTIZERS: dict[str, Callable[[Tensor], Weight]] = {
    "int8": quantize_int8,
    "int8 not turned": not_turned,
    "int4": quantize_int4,
    "int4 of 128": lambda matrix: quantize_int4(matrix, 128),
    "int4 of a row": lambda matrix: quantize_int4(matrix, matrix.shape[1]),
    "int4 shuffled": shuffled,
    "fp8": quantize_fp8,
}
kinds = st.sampled_from(list(QUANTIZERS))


def linear(
    weights: Weights, kind: str, rows: int, columns: int, *, bias: bool = True
) -> QuantizedLinear:
    matrix = weights.matrix(rows, columns, columns**-0.5)
    return QuantizedLinear(QUANTIZERS[kind](matrix), weights.vector(rows) if bias else None)


@quick
@given(kinds, st.integers(1, 70), sizes, sizes, st.booleans(), seeds)
def test_a_quantized_head_is_torchs(
    runtime: Runtime, kind: str, count: int, width: int, out: int, bias: bool, seed: int
) -> None:
    def make(weights: Weights) -> Program:
        head = Head(linear(weights, kind, out, width, bias=bias), out)
        return Program(weights, width, lambda ops, hidden: hidden, head=head)

    assert is_near(runtime, make, seed, prompt(count))


@quick
@given(kinds, kinds, st.integers(1, 40), sizes, sizes, seeds)
def test_a_quantized_mlp_is_torchs(
    runtime: Runtime, up: str, down: str, count: int, width: int, inner: int, seed: int
) -> None:
    def make(weights: Weights) -> Program:
        mlp = GatedMLP(
            linear(weights, up, 2 * inner, width),
            linear(weights, down, width, inner),
            ACTIVATIONS["silu"],
        )

        def body(ops: Ops[Any], hidden: Any) -> Any:
            update = ops.mlp(ops.norm(hidden, Rounding(weights.dtype)), mlp)
            return ops.add(hidden, update, no_norm, 1.0)

        return Program(weights, width, body)

    assert is_near(runtime, make, seed, prompt(count))


@pytest.mark.parametrize("width", [512, 576, 1024])
def test_wide_turns_are_torchs(runtime: Runtime, width: int) -> None:
    def make(weights: Weights) -> Program:
        head = Head(linear(weights, "int8", 40, width), 40)
        return Program(weights, width, lambda ops, hidden: hidden, head=head)

    assert is_near(runtime, make, 0, prompt(18))


def test_what_is_not_finite_stays_so(runtime: Runtime) -> None:
    def make(weights: Weights) -> Program:
        program = Program(
            weights, 64, lambda ops, hidden: hidden, head=Head(linear(weights, "int8", 9, 64), 9)
        )
        program.embedding.weight[7, 3] = torch.nan
        return program

    assert not is_near(runtime, make, 0, prompt(2))
