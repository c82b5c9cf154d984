"""`python -m tests.shard.backends.native.sanitized LIBRARY [sizes]`: under a sanitizer, every op
once, or every size that lies.
"""

import contextlib
import sys
from pathlib import Path

import torch
from tests.shard.backends.native.attention_steps import (
    MIXED,
    TREES,
    WIDE,
    Case,
    branching,
    layers,
    steps_of,
)
from tests.shard.backends.native.mutated_sizes import (
    PACKING,
    PROGRAMS,
    mutated_packing,
    mutated_tapes,
    outside_the_vocabulary,
)
from tests.shard.backends.native.programs import ARRANGED, Program, Weights, is_near, prompt
from tests.shard.backends.native.test_decodes import both
from tests.shard.backends.native.test_quantized import QUANTIZERS, linear

from kagami_shard.backends.native.check import agrees_with_torch
from kagami_shard.backends.native.library import Library
from kagami_shard.backends.native.runtime import Runtime
from kagami_shard.layers.embedding import Head
from kagami_shard.layers.mlp import ACTIVATIONS, MLP, GatedMLP
from kagami_shard.layers.norm import LayerNorm, no_norm

CASES = (
    Case(),
    Case(dim=8, rotary=6, group=1),
    Case(dim=80, rotary=80, num_kv_heads=1),
    Case(dim=256, rotary=64, num_kv_heads=1, group=2),
    Case(window=5, softcap=0.7, qk_norm="heads"),
    Case(qk_norm="all"),
)


def mlps(weights: Weights, *, gated: bool) -> Program:
    width, inner = 37, 50
    up, down = weights.linear(inner * (1 + gated), width), weights.linear(width, inner)
    mlp = (GatedMLP if gated else MLP)(up, down, ACTIVATIONS["gelu"])
    norm = LayerNorm(weights.vector(width), weights.vector(width), 1e-5)
    return Program(
        weights,
        width,
        lambda ops, hidden: ops.add(hidden, ops.mlp(ops.norm(hidden, norm), mlp), no_norm, 0.5),
    )


def quantized(weights: Weights, kind: str) -> Program:
    head = Head(linear(weights, kind, 45, 75), 45)
    return Program(weights, 75, lambda ops, hidden: hidden, head=head)


def refuse_lies(library: Library) -> None:
    for kind in PACKING:
        outcomes = mutated_packing(library, kind)
        assert outcomes.pop("sound") == 0
        assert set(outcomes.values()) == {1}, outcomes
    for program in PROGRAMS:
        reasons = mutated_tapes(Runtime(library, 1, use_amx=False), program)
        assert reasons.pop("sound") == ""
        assert all(reasons.values()), reasons
    for token in (-1, 64, 2**62):
        with contextlib.suppress(ValueError):
            outside_the_vocabulary(Runtime(library, 1, use_amx=False), token)
            raise AssertionError(token)
    sys.stdout.write("refused\n")


def main() -> None:
    library = Library(Path(sys.argv[1]))
    if sys.argv[2:]:
        refuse_lies(library)
        return
    for num_threads, use_amx in ((1, False), (2, False), (2, True)):
        runtime = Runtime(library, num_threads, use_amx=use_amx)
        assert agrees_with_torch(runtime)
        for case in CASES:
            assert is_near(runtime, case.program, 0, *steps_of(MIXED, 0)), case
        for case in (Case(dim=32), Case(dim=64, window=33)):
            steps = steps_of(WIDE, 0, ARRANGED)
            assert is_near(runtime, case.program, 0, *steps, block_size=ARRANGED), case
        for gated in (False, True):
            for count in (1, 5, 21):
                assert is_near(
                    runtime, lambda weights, g=gated: mlps(weights, gated=g), 0, prompt(count)
                )
        for kind in QUANTIZERS:
            for count in (1, 21, 140):
                assert is_near(
                    runtime, lambda weights, k=kind: quantized(weights, k), 0, prompt(count)
                ), (kind, count)
        assert is_near(runtime, Case().program, 0, *steps_of([(200, 1)], 0))
        assert is_near(runtime, layers, 0, prompt(150))
        for num_rows in (1, 140):
            steps = steps_of([*WIDE, (70, 130)], 0, ARRANGED, num_rows=num_rows)
            assert is_near(runtime, layers, 0, *steps, block_size=ARRANGED), num_rows
        for tree in TREES.values():
            assert is_near(runtime, Case().program, 0, *branching(tree, (30, 9)))
        ids, _ = runtime.choose_tokens(torch.randn(3, 77))
        runtime.logprobs(torch.randn(3, 77), ids[:, None])
        one_by_one, going_on = both(runtime)
        assert one_by_one == going_on
    sys.stdout.write("ok\n")


if __name__ == "__main__":
    with torch.inference_mode():
        main()
