"""Every op of the library but attention against its twin in torch, over random shapes."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.shard.backends.native.programs import (
    Program,
    Weights,
    is_near,
    lengths,
    prompt,
    quick,
    seeds,
    sizes,
)

from kagami_shard.backends.native.runtime import Runtime
from kagami_shard.layers.embedding import Head
from kagami_shard.layers.linear import Linear
from kagami_shard.layers.mlp import ACTIVATIONS, MLP, GatedMLP
from kagami_shard.layers.norm import LayerNorm, RMSNorm, Rounding, no_norm
from kagami_shard.models.ops import Ops


@quick
@given(st.integers(1, 40), sizes, sizes, st.booleans(), seeds)
def test_a_head_is_torchs(
    runtime: Runtime, count: int, width: int, out: int, bias: bool, seed: int
) -> None:
    def make(weights: Weights) -> Program:
        linear = weights.linear(out, width, bias=bias)
        head = Head(linear, out, divisor=3.0)
        return Program(weights, width, lambda ops, hidden: hidden, head=head)

    assert is_near(runtime, make, seed, prompt(count))


def test_logits_are_capped_and_an_embedding_is_scaled(runtime: Runtime) -> None:
    def make(weights: Weights) -> Program:
        head = Head(weights.linear(33, 24), 33, softcap=2.0)
        return Program(weights, 24, lambda ops, hidden: hidden, head=head, multiplier=1.5)

    assert is_near(runtime, make, 0, prompt(9))


def test_a_tied_head_is_read_by_both_ends(runtime: Runtime) -> None:
    def make(weights: Weights) -> Program:
        program = Program(weights, 40, lambda ops, hidden: hidden)
        program._head = Head(Linear(program.embedding.weight), 64)
        return program

    assert is_near(runtime, make, 0, prompt(9))


@quick
@given(lengths, sizes, st.floats(0.1, 2.0), seeds)
def test_a_linear_layer_adds_to_the_stream(
    runtime: Runtime, count: int, width: int, factor: float, seed: int
) -> None:
    def make(weights: Weights) -> Program:
        linear = weights.linear(width, width)

        def body(ops: Ops[Any], hidden: Any) -> Any:
            update = ops.linear(ops.norm(hidden, Rounding(weights.dtype)), linear)
            return ops.add(hidden, update, no_norm, factor)

        return Program(weights, width, body)

    assert is_near(runtime, make, seed, prompt(count))


@quick
@given(
    st.integers(1, 40),
    sizes,
    sizes,
    st.sampled_from(["silu", "gelu", "gelu_pytorch_tanh", "relu"]),
    st.booleans(),
    seeds,
)
def test_an_mlp_is_torchs(
    runtime: Runtime, count: int, width: int, inner: int, name: str, gated: bool, seed: int
) -> None:
    def make(weights: Weights) -> Program:
        up, down = weights.linear(inner * (1 + gated), width), weights.linear(width, inner)
        mlp = (GatedMLP if gated else MLP)(up, down, ACTIVATIONS[name])

        def body(ops: Ops[Any], hidden: Any) -> Any:
            return ops.mlp(ops.norm(hidden, Rounding(weights.dtype)), mlp)

        return Program(weights, width, body)

    assert is_near(runtime, make, seed, prompt(count))


@pytest.mark.parametrize("gated", [True, False])
def test_silu_far_from_zero_is_torchs(runtime: Runtime, gated: bool) -> None:
    def make(weights: Weights) -> Program:
        up, down = weights.linear(32 * (1 + gated), 32), weights.linear(32, 32)
        mlp = (GatedMLP if gated else MLP)(up, down, ACTIVATIONS["silu"])

        def body(ops: Ops[Any], hidden: Any) -> Any:
            return ops.mlp(ops.norm(hidden, Rounding(weights.dtype)), mlp)

        return Program(weights, 32, body, multiplier=100.0)

    assert is_near(runtime, make, 0, prompt(40))


@quick
@given(st.integers(1, 40), sizes, st.sampled_from(["rms", "centered", "layer"]), seeds)
def test_norms_are_torchs(runtime: Runtime, count: int, width: int, kind: str, seed: int) -> None:
    def make(weights: Weights) -> Program:
        weight, bias = weights.vector(width), weights.vector(width)
        norm = {
            "rms": RMSNorm(weight, 1e-5),
            "centered": RMSNorm(weight, 1e-5, center=1.0),
            "layer": LayerNorm(weight, bias, 1e-5),
        }[kind]
        linear = weights.linear(width, width)

        def body(ops: Ops[Any], hidden: Any) -> Any:
            return ops.add(hidden, ops.linear(ops.norm(hidden, norm), linear), norm, 0.5)

        return Program(weights, width, body)

    # LayerNorm of few values divides by a variance that rounding made.
    assert width < 8 or is_near(runtime, make, seed, prompt(count))


@quick
@given(st.integers(1, 9), st.integers(1, 300), seeds)
def test_greedy_rows_are_argmax_and_its_logprob(
    runtime: Runtime, count: int, vocab_size: int, seed: int
) -> None:
    logits = Weights(seed, torch.float32).matrix(count, vocab_size, 5.0)
    ids, logprobs = runtime.choose_tokens(logits)
    assert (ids == logits.argmax(-1)).all()
    torch.testing.assert_close(logprobs, logits.log_softmax(-1).amax(-1), atol=1e-4, rtol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_greedy_row_without_a_distribution_has_no_finite_logprob(
    runtime: Runtime, value: float
) -> None:
    logits = torch.zeros(2, 40)
    logits[1, 17] = value
    _, logprobs = runtime.choose_tokens(logits)
    assert logprobs.isfinite().tolist() == [True, False]


@quick
@given(st.integers(1, 9), st.integers(1, 300), seeds)
def test_logprobs_of_given_ids_have_the_bits_of_the_chosen_token(
    runtime: Runtime, count: int, vocab_size: int, seed: int
) -> None:
    logits = Weights(seed, torch.float32).matrix(count, vocab_size, 5.0)
    chosen, expected = runtime.choose_tokens(logits)
    ids = torch.stack((chosen, (chosen + seed) % vocab_size), dim=1)
    logprobs = runtime.logprobs(logits, ids)
    assert torch.equal(logprobs[:, 0], expected)
    exact = logits.log_softmax(-1).gather(-1, ids)
    torch.testing.assert_close(logprobs, exact, atol=1e-4, rtol=1e-5)


def test_a_row_has_the_same_bits_alone_and_among_others(runtime: Runtime) -> None:
    logits = Weights(0, torch.float32).matrix(7, 3001, 5.0)
    ids = torch.arange(7)[:, None]
    alone = [runtime.logprobs(logits[i : i + 1], ids[i : i + 1]) for i in range(7)]
    assert torch.equal(runtime.logprobs(logits, ids), torch.cat(alone))
