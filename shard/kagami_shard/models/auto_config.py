"""config.json through transformers, whose import takes its time: `config.py` asks where it must."""

from pathlib import Path

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from kagami_proto.errors import UnsupportedModel
from kagami_shard.models.config import Config

_FOREIGN = (
    *(ArithmeticError, AttributeError, ImportError, LookupError),
    *(OSError, RuntimeError, TypeError, ValueError, StrictDataclassError),
)
"""What reading a file that is not as transformers expects it has been seen to raise, and its kin"""
_MAX_TEXT = 300


def read(folder: Path, *, trust_remote_code: bool) -> Config:
    """With transformers' defaults and names. Raises `UnsupportedModel`."""
    try:
        config: Config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except _FOREIGN as error:
        line = " ".join(str(error).split())[:_MAX_TEXT] or type(error).__name__
        raise UnsupportedModel(f"{folder / 'config.json'} cannot be read: {line}") from error
    return config
