"""What a generation starts from: ids, the text they stand for, and media among them."""

from dataclasses import dataclass
from typing import NamedTuple


class Media(NamedTuple):
    """An image or a sound in a prompt; its tokens are the positions from `start` to before `end`.

    The ids there are the same for every image: only the hash says which one it is.
    """

    content_hash: bytes
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Prompt:
    """The ids that the model is fed first."""

    ids: tuple[int, ...]
    text: str
    """What they were made of, or, where a client gave ids, what they stand for."""
    media: tuple[Media, ...] = ()
