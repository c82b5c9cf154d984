"""config.json through transformers, whose import takes its time: `config.py` asks where it must."""

from pathlib import Path

from transformers import AutoConfig

from kagami_proto.errors import UnsupportedModel
from kagami_shard.models.config import Config


def read(folder: Path, *, trust_remote_code: bool) -> Config:
    """With transformers' defaults and names. Raises `UnsupportedModel`."""
    try:
        config: Config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (ValueError, KeyError, OSError) as error:
        first_line = str(error).strip().partition("\n")[0]
        raise UnsupportedModel(f"{folder / 'config.json'} cannot be read: {first_line}") from error
    return config
