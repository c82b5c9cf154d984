import pytest
import torch
from tests.shard.sampling.test_sampler import logits_of

from kagami_shard.sampling.logprobs import TorchScorer, score


def test_scores_have_the_given_tokens_and_the_most_likely() -> None:
    logits = logits_of(3)

    scores = score(logits, torch.tensor([4, 5, 6]), 2, TorchScorer())

    expected = logits.log_softmax(-1)
    torch.testing.assert_close(scores.logprobs, expected[range(3), [4, 5, 6]])
    torch.testing.assert_close(scores.top_logprobs, expected.topk(2).values)
    assert torch.equal(scores.top_ids, expected.topk(2).indices)


@pytest.mark.parametrize("vocab", [7, 500, 32_003, 49_152])
def test_logprobs_of_a_row_have_the_same_bits_alone_and_among_others(vocab: int) -> None:
    logits = logits_of(9, vocab)
    ids = torch.arange(27).view(9, 3) % vocab

    together = TorchScorer().logprobs(logits, ids)
    alone = [TorchScorer().logprobs(logits[i : i + 1].clone(), ids[i : i + 1]) for i in range(9)]

    assert torch.equal(together, torch.cat(alone))


def test_the_chosen_token_has_the_bits_of_its_logprob_among_others() -> None:
    logits = logits_of(5)
    chosen, logprobs = TorchScorer().choose_tokens(logits)

    assert torch.equal(chosen, logits.argmax(-1))
    assert torch.equal(logprobs, score(logits, chosen, 3, TorchScorer()).top_logprobs[:, 0])


def test_a_row_without_a_distribution_has_no_finite_logprob() -> None:
    logits = logits_of(2)
    logits[1, 3] = float("nan")

    assert TorchScorer().choose_tokens(logits)[1].isfinite().tolist() == [True, False]
