from pathlib import Path

import pytest
from tests.fakes.byte_tokenizer import byte_tokenizer_with_start
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from kagami_benchmark.prompts import Words
from kagami_benchmark.workload import Length, Workload


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A byte-level vocabulary with all words of three letters a to f."""
    letters = "abcdef"
    words = [f"Ġ{a}{b}{c}" for a in letters for b in letters for c in letters]
    vocabulary = {word: number for number, word in enumerate([*"Ġabcdef", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="Ġ"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def workload(prompt: Length, prefix_tokens: int = 0) -> Workload:
    return Workload("w", prompt, Length(1, 9), 5, prefix_tokens=prefix_tokens, concurrency=1)


def test_a_prompt_has_as_many_tokens_as_asked_for(path: Path) -> None:
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    for prompt in Words.load(path).prompts(workload(Length(20, 20), 7), "seed"):
        assert tuple(tokenizer.encode(prompt.text).ids) == prompt.ids
        assert len(prompt.ids) == 27


def test_the_prefix_is_shared_and_the_rest_is_not(path: Path) -> None:
    prompts = Words.load(path).prompts(workload(Length(20, 20), 7), "seed")

    assert len({prompt.ids[:7] for prompt in prompts if prompt.ids}) == 1
    assert len({prompt.ids[7:] for prompt in prompts if prompt.ids}) == 5


def test_lengths_are_drawn_from_their_range() -> None:
    prompts = Words.common().prompts(workload(Length(3, 6)), "seed")

    assert {len(prompt.text.split()) for prompt in prompts} <= {3, 4, 5, 6}
    assert {prompt.max_new_tokens for prompt in prompts} <= {*range(1, 10)}


def test_a_seed_gives_the_same_prompts_again_and_another_one_others() -> None:
    words, work = Words.common(), workload(Length(9, 9))

    assert words.prompts(work, "1") == words.prompts(work, "1") != words.prompts(work, "2")


def test_a_vocabulary_without_words_is_refused(tmp_path: Path) -> None:
    byte_tokenizer_with_start().save(str(tmp_path / "tokenizer.json"))

    with pytest.raises(ValueError, match="has only 0 words of one token"):
        Words.load(tmp_path)


def test_a_folder_without_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"--tokenizer-name: there is no .*tokenizer\.json"):
        Words.load(tmp_path)
