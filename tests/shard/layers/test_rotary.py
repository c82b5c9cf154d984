import math

import torch

from kagami_shard.layers.rotary import RopeSpec, RotaryEmbedding, rotate

CPU = torch.device("cpu")


def spec(**fields: object) -> RopeSpec:
    defaults = {"rotary_dim": 8, "theta": 100.0, "max_positions": 32, "max_length": 32}
    return RopeSpec(**(defaults | fields))


def turned(rope: RopeSpec, heads: torch.Tensor, *positions: int) -> torch.Tensor:
    rotation = RotaryEmbedding(rope, CPU).rotation(torch.tensor(positions), torch.float32)
    return rotate(heads, rotation)


def test_position_zero_does_not_turn() -> None:
    heads = torch.randn(1, 2, 8)
    assert torch.equal(turned(spec(), heads, 0), heads)


def test_a_pair_turns_by_position_times_frequency() -> None:
    heads = torch.zeros(1, 1, 8)
    heads[..., 1] = 1.0
    angle = 3 * 100.0 ** (-2 / 8)
    result = turned(spec(), heads, 3)[0, 0]
    assert math.isclose(result[1], math.cos(angle), abs_tol=1e-6)
    assert math.isclose(result[5], math.sin(angle), abs_tol=1e-6)


def test_scores_depend_on_the_distance_alone() -> None:
    query, key = torch.randn(1, 1, 8), torch.randn(1, 1, 8)
    near = (turned(spec(), query, 7) * turned(spec(), key, 2)).sum()
    far = (turned(spec(), query, 27) * turned(spec(), key, 22)).sum()
    torch.testing.assert_close(near, far)


def test_only_the_rotary_part_of_a_head_turns() -> None:
    heads = torch.randn(1, 2, 8)
    result = turned(spec(rotary_dim=4), heads, 5)
    assert torch.equal(result[..., 4:], heads[..., 4:])
    assert not torch.equal(result[..., :4], heads[..., :4])


def test_dynamic_frequencies_stretch_with_the_longest_sequence() -> None:
    heads = torch.randn(1, 1, 8)
    dynamic = {"kind": "dynamic", "parameters": {"factor": 2.0}}
    plain = turned(spec(), heads, 9)
    assert torch.equal(turned(spec(**dynamic), heads, 9), plain)
    assert not torch.equal(turned(spec(**dynamic, max_length=64), heads, 9), plain)
