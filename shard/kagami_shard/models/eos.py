"""Which ids end a text, as the files of a model folder say.

The files may contradict each other: a generation_config.json of the base model beside a tokenizer
of the chat model is common. So all of them count, as in vLLM. The router adds what it learns of the
tokenizer and the chat template.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kagami_proto.errors import InvalidCheckpoint
from kagami_proto.model_files import special_token_text
from kagami_shard.weights.json_files import read_object, shown

_MAX_IDS = 1024


def eos_token_ids(folder: Path) -> list[int]:
    """The ids that end a text, each once; empty if no file names one. Raises `InvalidCheckpoint`.

    Read are `eos_token_id` of generation_config.json and config.json, a number or a list, and
    `eos_token` of tokenizer_config.json where that file also has the token's id.
    """
    ids: dict[int, None] = {}
    for name in ("generation_config.json", "config.json"):
        path = folder / name
        if path.is_file():
            ids |= dict.fromkeys(_ids_of(path, read_object(path)))
    path = folder / "tokenizer_config.json"
    if path.is_file():
        ids |= dict.fromkeys(_of_tokenizer(read_object(path)))
    return list(ids)


def _ids_of(path: Path, config: Mapping[str, Any]) -> list[int]:
    text_config = config.get("text_config")
    inner = text_config.get("eos_token_id") if isinstance(text_config, dict) else None
    value = config.get("eos_token_id", inner)
    if value is None:
        return []
    ids = value if isinstance(value, list) else [value]
    if len(ids) > _MAX_IDS or not all(map(_is_id, ids)):
        raise InvalidCheckpoint(f"{path}: eos_token_id {shown(value)} is no token id")
    return ids


def _is_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 32


def _of_tokenizer(config: Mapping[str, Any]) -> Iterator[int]:
    added = config.get("added_tokens_decoder")
    text = special_token_text(config.get("eos_token"))
    if text is None or not isinstance(added, dict):
        return
    for number, token in added.items():
        if special_token_text(token) == text and number.isascii() and number.isdecimal():
            if len(number) <= 10 and _is_id(int(number)):
                yield int(number)
