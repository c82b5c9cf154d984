import math

import torch

from kagami_proto.values import SamplingParams
from kagami_shard.sampling.sampler import SamplingRow, draw
from kagami_shard.sampling.watermark import Watermark, add_watermark, green

VOCAB = 1000


def test_the_share_of_green_tokens_is_gamma() -> None:
    for gamma in (0.1, 0.5, 0.9):
        share = green(torch.arange(200), VOCAB, gamma).float().mean()
        assert abs(float(share) - gamma) < 0.005


def test_the_green_list_depends_on_the_token_before_alone() -> None:
    alone = green(torch.tensor([7]), VOCAB, 0.5)
    among = green(torch.tensor([3, 7, 11]), VOCAB, 0.5)

    assert torch.equal(alone[0], among[1])
    assert 0.4 < float((among[0] == among[1]).float().mean()) < 0.6


def test_neighbouring_tokens_have_unrelated_lists() -> None:
    lists = green(torch.arange(400), VOCAB, 0.5).float() - 0.5
    for lag in (1, 2, 3):
        diagonal = (lists[:-lag, :-lag] * lists[lag:, lag:]).mean() * 4
        assert abs(float(diagonal)) < 0.02


def test_only_green_logits_of_its_rows_are_raised() -> None:
    logits = torch.zeros(3, VOCAB)
    add_watermark(logits, [0, 2], [5, 6], Watermark(0.25, 3.0))

    assert torch.equal(logits[0] == 3.0, green(torch.tensor([5]), VOCAB, 0.25)[0])
    assert not logits[1].any()


def z_score(is_marked: bool) -> float:
    """How many standard deviations more green tokens than chance 300 draws have."""
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(1))
    parameters = SamplingParams(do_sample=True, seed=3, watermark=is_marked)
    last, count, num_green = 0, 300, 0
    for position in range(count):
        drawn = int(draw(logits, [SamplingRow(parameters, position, None, 0, last)]).token_ids)
        num_green += bool(green(torch.tensor([last]), VOCAB, 0.5)[0, drawn])
        last = drawn
    return (num_green - count / 2) / math.sqrt(count / 4)


def test_a_watermark_shows_in_a_text_and_is_not_in_others() -> None:
    assert z_score(is_marked=True) > 8
    assert abs(z_score(is_marked=False)) < 3


def test_logprobs_are_those_without_the_watermark() -> None:
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(1))
    drawn = draw(logits, [SamplingRow(SamplingParams(watermark=True), 0, None, 0, 1)])

    expected = logits.log_softmax(-1)[0, drawn.token_ids[0]]
    torch.testing.assert_close(drawn.logprobs[0], expected)
