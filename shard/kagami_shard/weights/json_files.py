"""JSON files of a model folder, whatever is in them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kagami_proto.errors import InvalidCheckpoint

_MAX_BYTES = 64 << 20
"""The largest published index of weights has some 10 MB"""
_MAX_SHOWN = 60


def read_object(file: Path) -> Mapping[str, Any]:
    """The JSON object in `file`. Raises `InvalidCheckpoint`, and OSError."""
    if (size := file.stat().st_size) > _MAX_BYTES:
        raise InvalidCheckpoint(f"{file} has {size} bytes, at most {_MAX_BYTES} are read")
    try:
        content = json.loads(file.read_bytes())
    except RecursionError as error:
        raise InvalidCheckpoint(f"{file} is nested too deeply") from error
    except ValueError as error:
        raise InvalidCheckpoint(f"{file} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise InvalidCheckpoint(f"{file} is not a JSON object, but {shown(content)}")
    return content


def shown(value: object) -> str:
    """A value for a message: short, in one line."""
    if isinstance(value, int) and abs(value) >= 1 << 64:
        return "a huge number"
    text = ascii(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[: _MAX_SHOWN - 3]}..."
