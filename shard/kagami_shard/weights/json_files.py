"""JSON files of a model folder, whatever is in them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kagami_proto import model_files
from kagami_proto.errors import InvalidCheckpoint

_MAX_SHOWN = 60


def read_object(file: Path) -> Mapping[str, Any]:
    """The JSON object in `file`; raises `InvalidCheckpoint`."""
    try:
        return model_files.read_object(file)
    except model_files.BrokenFile as error:
        raise InvalidCheckpoint(str(error)) from error


def shown(value: object) -> str:
    """A value for a message: short, in one line."""
    if isinstance(value, int) and abs(value) >= 1 << 64:
        return "a huge number"
    text = ascii(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[: _MAX_SHOWN - 3]}..."
