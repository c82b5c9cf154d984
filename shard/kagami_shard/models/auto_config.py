"""config.json through transformers, whose import takes its time: `config.py` asks where it must."""

from collections.abc import Iterator
from contextlib import contextmanager
from logging import CRITICAL
from pathlib import Path

from transformers import AutoConfig
from transformers.utils import logging

from kagami_proto.errors import UnsupportedModel
from kagami_shard.models.config import Config

_MAX_TEXT = 300


def read(folder: Path, *, trust_remote_code: bool) -> Config:
    """With transformers' defaults and names. Raises `UnsupportedModel`."""
    try:
        with _silent():
            config: Config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    # Foreign code reads a foreign file: its validators' exceptions have no common root.
    except Exception as error:
        line = " ".join(str(error).split())[:_MAX_TEXT] or type(error).__name__
        raise UnsupportedModel(f"{folder / 'config.json'} cannot be read: {line}") from error
    return config


@contextmanager
def _silent() -> Iterator[None]:
    """transformers logs the whole configuration beside some of its errors."""
    level = logging.get_verbosity()
    logging.set_verbosity(CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(level)
