import pytest
import torch

from kagami_proto.values import SamplingParams
from kagami_shard.sampling.processors import History
from kagami_shard.sampling.sampler import SamplingRow, draw

GREEDY = SamplingParams()


def logits_of(rows: int, vocab: int = 500, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * 2


def sampled(seed: int, **changes: object) -> SamplingParams:
    return SamplingParams(do_sample=True, seed=seed, **changes)  # type: ignore[arg-type]


def test_greedy_rows_take_the_argmax_and_its_logprob() -> None:
    logits = logits_of(3)

    drawn = draw(logits, [SamplingRow(GREEDY, 5, None, 0)] * 3)

    assert torch.equal(drawn.token_ids, logits.argmax(-1))
    torch.testing.assert_close(drawn.logprobs, logits.log_softmax(-1).max(-1).values)


def test_a_row_draws_the_same_alone_and_among_others() -> None:
    logits = logits_of(16)
    rows = [
        SamplingRow(
            sampled(seed, temperature=0.5 + seed / 10, top_p=0.5 + seed / 40), seed, None, 0
        )
        for seed in range(16)
    ]

    together = draw(logits, rows).token_ids.tolist()
    alone = [draw(logits[i : i + 1], [rows[i]]).token_ids.item() for i in range(16)]

    assert together == alone


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([[0.5, 0.25, 0.125, 0.125]]).log()
    rows = [SamplingRow(sampled(seed), 1, None, 0) for seed in range(4000)]

    counts = draw(logits.expand(4000, -1), rows).token_ids.bincount(minlength=4) / 4000

    torch.testing.assert_close(counts, logits.exp()[0], atol=0.03, rtol=0)


def test_filters_bound_what_is_drawn() -> None:
    logits = logits_of(1).expand(300, -1)
    best = logits[0].topk(3).indices

    drawn = draw(logits, [SamplingRow(sampled(seed, top_k=3), 2, None, 0) for seed in range(300)])

    assert set(drawn.token_ids.tolist()) == set(best.tolist())


def test_logprobs_are_of_the_unprocessed_distribution() -> None:
    logits = logits_of(1)
    parameters = sampled(3, temperature=0.1, top_k=1, repetition_penalty=1.5)

    drawn = draw(logits, [SamplingRow(parameters, 0, History([1, 2], 2), 0)])

    expected = logits.log_softmax(-1).gather(-1, drawn.token_ids[:, None])[:, 0]
    torch.testing.assert_close(drawn.logprobs, expected)


def test_top_tokens_come_most_likely_first() -> None:
    logits = logits_of(2)

    drawn = draw(logits, [SamplingRow(GREEDY, 0, None, 4), SamplingRow(GREEDY, 0, None, 0)])

    assert drawn.top_ids[0].tolist() == logits[0].topk(4).indices.tolist()
    assert drawn.top_logprobs[0, 0] == drawn.logprobs[0]


def test_penalties_change_the_choice_and_not_the_logits() -> None:
    logits = torch.tensor([[2.0, 1.9, 0.0]])
    parameters = SamplingParams(frequency_penalty=1.0)

    drawn = draw(logits, [SamplingRow(parameters, 3, History([0], 0), 0)])

    assert drawn.token_ids.tolist() == [1]
    assert logits.tolist() == [[2.0, 1.8999999761581421, 0.0]]


def test_a_row_that_is_not_finite_spoils_no_other() -> None:
    logits = logits_of(2)
    expected = draw(logits[:1], [SamplingRow(sampled(1), 1, None, 0)]).token_ids
    logits[1] = float("nan")

    drawn = draw(logits, [SamplingRow(sampled(1), 1, None, 0), SamplingRow(sampled(2), 1, None, 0)])

    assert drawn.token_ids[0] == expected[0]
    assert drawn.logprobs.isfinite().tolist() == [True, False]


def test_a_row_without_a_distribution_is_not_finite() -> None:
    logits = torch.tensor([[1.0, 2.0, 3.0]])
    parameters = sampled(1, repetition_penalty=1e-40)

    drawn = draw(logits, [SamplingRow(parameters, 1, History([0], 0), 0)])

    assert not drawn.logprobs.isfinite().any()


def test_a_bias_is_added_to_its_row_only_and_not_to_the_logprob() -> None:
    logits = torch.tensor([[2.0, 1.9, 0.0], [2.0, 1.9, 0.0]])
    biased = SamplingParams(logit_bias=((1, 0.2), (2, -3.0)))

    drawn = draw(logits, [SamplingRow(biased, 0, None, 0), SamplingRow(GREEDY, 0, None, 0)])

    assert drawn.token_ids.tolist() == [1, 0]
    torch.testing.assert_close(drawn.logprobs[0], logits.log_softmax(-1)[0, 1])
    assert logits[0].tolist() == pytest.approx([2.0, 1.9, 0.0])


def test_a_bias_of_100_forces_and_of_minus_100_bans_whatever_the_logits() -> None:
    logits = torch.tensor([[500.0, 0.0, -500.0, 400.0]]).expand(200, -1)
    forced = [SamplingRow(sampled(i, logit_bias=((2, 100.0),)), 0, None, 0) for i in range(200)]
    banned = [SamplingRow(sampled(i, logit_bias=((0, -100.0),)), 0, None, 0) for i in range(200)]

    assert set(draw(logits, forced).token_ids.tolist()) == {2}
    assert set(draw(logits, banned).token_ids.tolist()) == {3}


def test_two_forced_tokens_keep_their_odds() -> None:
    logits = torch.tensor([[0.0, 1.0, 0.0, 9.0]]).expand(4000, -1)
    both = ((0, 100.0), (1, 100.0))
    rows = [SamplingRow(sampled(i, logit_bias=both), 0, None, 0) for i in range(4000)]

    drawn = draw(logits, rows).token_ids

    assert float((drawn == 1).float().mean()) == pytest.approx(0.731, abs=0.03)
    assert int(drawn.max()) == 1


def test_a_greedy_row_has_the_same_bits_beside_greedy_and_sampled_rows() -> None:
    logits = logits_of(2)
    greedy = SamplingRow(GREEDY, 5, None, 0)

    results = [
        draw(logits[:1], [greedy]),
        draw(logits, [greedy, greedy]),
        draw(logits, [greedy, SamplingRow(sampled(1), 5, None, 0)]),
        draw(logits, [greedy, SamplingRow(GREEDY, 5, None, 3)]),
    ]

    assert len({(int(one.token_ids[0]), float(one.logprobs[0])) for one in results}) == 1
