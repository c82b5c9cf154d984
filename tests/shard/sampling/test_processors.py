"""Each processor against transformers' of the same name, row by row."""

import torch
from transformers import generation

from kagami_shard.sampling.processors import History, keep_likely, keep_top, keep_typical, penalize

VOCAB = 3000


def random_logits(rows: int, seed: int) -> torch.Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


def kept_by(warper: object, logits: torch.Tensor) -> torch.Tensor:
    return torch.isfinite(warper(None, logits.clone()))  # type: ignore[operator]  # untyped library


def test_keep_top_is_top_k_then_top_p() -> None:
    logits = random_logits(4, 0)
    top_k, top_p = torch.tensor([5, 2000, VOCAB, 50]), torch.tensor([1.0, 0.7, 0.95, 0.3])

    keep = keep_top(logits, top_k, top_p)

    for row in range(4):
        after_k = generation.TopKLogitsWarper(int(top_k[row]))(None, logits[row : row + 1])
        expected = generation.TopPLogitsWarper(float(top_p[row]))(None, after_k)
        assert torch.equal(keep[row], torch.isfinite(expected[0]))


def test_keep_top_sorts_whole_rows_that_are_too_flat_for_the_candidates() -> None:
    logits = random_logits(2, 1) * 0.01

    keep = keep_top(logits, torch.tensor([VOCAB, VOCAB]), torch.tensor([0.9, 0.5]))

    for row, top_p in enumerate((0.9, 0.5)):
        expected = kept_by(generation.TopPLogitsWarper(top_p), logits[row : row + 1])[0]
        assert abs(int(keep[row].sum()) - int(expected.sum())) <= 1
        assert keep[row].sum() > 1024


def test_keep_top_keeps_one_token_at_a_tiny_top_p() -> None:
    logits = random_logits(1, 2)

    keep = keep_top(logits, torch.tensor([VOCAB]), torch.tensor([1e-6]))

    assert keep.sum() == 1
    assert keep[0, logits.argmax()]


def test_keep_likely_is_transformers() -> None:
    torch.manual_seed(0)
    logits = torch.randn(5, 1000) * 4
    shares = torch.tensor([0.01, 0.05, 0.3, 0.9, 1.0])
    keep = keep_likely(logits, shares)
    for row in range(5):
        warper = generation.MinPLogitsWarper(float(shares[row]))
        assert torch.equal(keep[row], kept_by(warper, logits[row : row + 1])[0])
    assert keep[4].sum() == 1


def test_keep_typical_is_transformers() -> None:
    logits = random_logits(3, 3)
    mass = torch.tensor([0.2, 0.7, 0.95])

    keep = keep_typical(logits, mass)

    for row in range(3):
        expected = kept_by(generation.TypicalLogitsWarper(float(mass[row])), logits[row : row + 1])[
            0
        ]
        assert abs(int(keep[row].sum()) - int(expected.sum())) <= 1
        assert (keep[row] ^ expected).sum() <= 1


def test_repetition_penalty_is_transformers() -> None:
    logits = random_logits(2, 4)
    ids = [7, 7, 9, 100]
    expected = generation.RepetitionPenaltyLogitsProcessor(1.3)(
        torch.tensor([ids]), logits[1:].clone()
    )

    penalize(logits, [1], [History(ids, 2)], [1.3], [0.0], [0.0])

    torch.testing.assert_close(logits[1:], expected)


def test_frequency_and_presence_count_the_output_only() -> None:
    logits = torch.zeros(1, 10)

    penalize(logits, [0], [History([1, 2, 2, 3, 3, 3], 2)], [1.0], [0.5], [0.25])

    assert logits[0].tolist() == [0, 0, -0.75, -1.75, 0, 0, 0, 0, 0, 0]


def test_penalties_of_one_row_leave_the_others() -> None:
    logits = random_logits(3, 5)
    before = logits.clone()

    penalize(logits, [1], [History([4], 0)], [1.0], [1.0], [0.0])

    assert torch.equal(logits[[0, 2]], before[[0, 2]])
    assert (logits != before).sum() == 1
