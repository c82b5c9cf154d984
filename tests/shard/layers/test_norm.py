import torch

from kagami_shard.layers.norm import LayerNorm, RMSNorm, Rounding


def test_rms_norm_scales_to_unit_mean_square() -> None:
    normed = RMSNorm(torch.ones(64), 0.0)(torch.randn(3, 64) * 7)
    torch.testing.assert_close(normed.square().mean(-1), torch.ones(3))


def test_a_centered_weight_of_zero_changes_nothing() -> None:
    hidden = torch.randn(3, 8)
    centered = RMSNorm(torch.zeros(8), 1e-6, center=1.0)
    assert torch.equal(centered(hidden), RMSNorm(torch.ones(8), 1e-6)(hidden))


def test_layer_norm_matches_torch() -> None:
    hidden, weight, bias = torch.randn(3, 8), torch.randn(8), torch.randn(8)
    expected = torch.nn.functional.layer_norm(hidden, (8,), weight, bias, 1e-5)
    assert torch.equal(LayerNorm(weight, bias, 1e-5)(hidden), expected)


def test_norms_round_once_to_the_dtype_of_their_weights() -> None:
    hidden, weight = torch.randn(3, 8), torch.randn(8).bfloat16()
    exact = RMSNorm(weight.float(), 1e-6)(hidden)
    assert torch.equal(RMSNorm(weight, 1e-6)(hidden), exact.bfloat16())
    assert LayerNorm(weight, weight, 1e-6)(hidden).dtype == torch.bfloat16
    assert Rounding(torch.bfloat16)(hidden).dtype == torch.bfloat16
