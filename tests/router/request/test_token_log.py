"""The tokens of a sequence: its prompt and what was generated until now."""

from kagami_router.request.token_log import TokenLog, TopToken


def test_the_prompt_comes_first() -> None:
    log = TokenLog((1, 2, 3))
    log.ids.append(7)
    assert (log.prompt_ids, log.generated_ids, log.num_generated) == ([1, 2, 3], [7], 1)


def test_prompt_logprobs_come_in_chunks_and_again_on_a_replay() -> None:
    log = TokenLog((1, 2, 3, 4))
    log.take_prompt_logprobs(1, [-1.0, -2.0])
    assert not log.has_prompt_logprobs
    log.take_prompt_logprobs(2, [-2.0, -3.0])
    assert log.has_prompt_logprobs
    assert log.prompt_logprobs() == [None, -1.0, -2.0, -3.0]


def test_prompt_top_tokens_lie_beside_their_logprobs() -> None:
    log = TokenLog((1, 2, 3))
    top = (TopToken(5, -0.5), TopToken(3, -1.0))
    log.take_prompt_logprobs(2, [-1.0], [top])
    assert log.prompt_top_tokens() == [(), (), top]


def test_a_prompt_of_one_token_has_no_logprob_to_wait_for() -> None:
    assert TokenLog((1,)).has_prompt_logprobs
