"""Prompts of a wanted length in tokens; no two are the same.

They are made of words that are one token each: words of the given tokenizer, else common words that
nearly every vocabulary has. The length is approximate. Reports use the server's count.
"""

from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import NamedTuple

from tokenizers import Tokenizer

from kagami_benchmark.workload import Workload

# How byte-level and sentencepiece vocabularies write the space in front of a word.
_SPACES = ("Ġ", "▁")
_MIN_WORDS = 100
_COMMON = tuple(
    """ time people year way day man thing woman life child world school state family student
    group country problem hand part place case week company system program question work number
    night point home water room mother area money story fact month lot right study book eye job
    word business issue side kind head house service friend father power hour game line end
    member law car city community name""".split()
)


class Prompt(NamedTuple):
    """One prompt; `ids` where the words' ids are known."""

    text: str
    ids: tuple[int, ...] | None
    max_new_tokens: int


class Words:
    """Words of one token each, with their ids where a tokenizer told them."""

    def __init__(self, words: Sequence[str], ids: Sequence[int] | None) -> None:
        self._words = words
        self._ids = ids

    @classmethod
    def common(cls) -> "Words":
        """Common words, for use without a tokenizer."""
        return cls([f" {word}" for word in _COMMON], None)

    @classmethod
    def load(cls, path: Path) -> "Words":
        """From a tokenizer.json, or the folder it is in; raises `ValueError`."""
        file = path / "tokenizer.json" if path.is_dir() else path
        if not file.is_file():
            raise ValueError(f"--tokenizer-name: there is no {file}")
        try:
            tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f"--tokenizer-name: {file}: {error}") from error
        found = sorted(
            (token_id, token[1:])
            for token, token_id in tokenizer.get_vocab().items()
            if token.startswith(_SPACES) and len(token) > 3 and _is_lower_ascii(token[1:])
        )
        if len(found) < _MIN_WORDS:
            raise ValueError(f"--tokenizer-name: {file} has only {len(found)} words of one token")
        return cls([f" {word}" for _, word in found], [token_id for token_id, _ in found])

    def prompts(self, workload: Workload, seed: str) -> list[Prompt]:
        """All prompts of one run: the same for the same seed, whatever server they are for."""
        shared = self._draw(workload.prefix_tokens, Random(f"{seed} prefix"))
        prompts = []
        for number in range(workload.num_requests):
            random = Random(f"{seed} {number}")
            indexes = shared + self._draw(workload.prompt.draw(random), random)
            text = "".join([self._words[index] for index in indexes])
            ids = None if self._ids is None else tuple(self._ids[index] for index in indexes)
            prompts.append(Prompt(text, ids, workload.output.draw(random)))
        return prompts

    def _draw(self, count: int, random: Random) -> list[int]:
        return random.choices(range(len(self._words)), k=count)


def _is_lower_ascii(word: str) -> bool:
    """Whether the word is letters only: others may merge with their neighbours to other tokens."""
    return word.isascii() and word.isalpha() and word.islower()
