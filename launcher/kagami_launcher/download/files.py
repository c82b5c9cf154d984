"""Which files of a repository are wanted. Pure: a listing in, a selection out.

Weights are of one kind (the first there is of safetensors, .bin, .pt, .gguf), from the top level.
With them come the other files that a server reads: configuration, tokenizer and templates. Python
code comes only where it is trusted.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from kagami_launcher.model.hub_cache import WEIGHT_EXTENSIONS

PREFERRED = ".safetensors"
# As in TGI: a trainer left these behind.
_NO_WEIGHTS = ("arguments", "args", "training")
# The names that `save_pretrained` gives to weights. If there are any, other files are a copy
# (Mistral's consolidated.safetensors, model.fp16.safetensors), except the extras.
_STANDARD = re.compile(r"(model|pytorch_model)(-\d+-of-\d+)?\.\w+")
_EXTRAS = ("adapter", "medusa")
_TEXT_ENDINGS = (".json", ".jinja", ".model", ".tiktoken")
_TEXT_NAMES = ("merges.txt", "vocab.txt")
# The only folder that is read: where `save_pretrained` puts the named chat templates.
_TEMPLATE = re.compile(r"additional_chat_templates/[^/]+\.jinja")
_NO_TEXTS = ("trainer", "training", "results", "optimizer", "scheduler")


class NoWeights(Exception):
    """The repository holds no weights to serve, or more than one kind to choose from."""


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """One file of a repository at a commit."""

    name: str
    size: int
    sha256: str | None = None  # only of files in Git LFS, which all large ones are

    @property
    def extension(self) -> str:
        return "." + self.name.rpartition(".")[2]


@dataclass(frozen=True, slots=True)
class Selection:
    """The files to fetch: the small ones first, so that weights always have their index."""

    texts: tuple[RemoteFile, ...]
    weights: tuple[RemoteFile, ...]
    extension: str


def select(
    files: Sequence[RemoteFile],
    *,
    extension: str = PREFERRED,
    allow_others: bool = True,
    trust_remote_code: bool = False,
) -> Selection:
    """Choose; raises `NoWeights`. Another kind than safetensors is taken only if asked for."""
    top = sorted((file for file in files if "/" not in file.name), key=lambda file: file.name)
    wanted = WEIGHT_EXTENSIONS if extension == PREFERRED and allow_others else (extension,)
    for kind in wanted:
        if weights := _weights(top, kind):
            break
    else:
        raise NoWeights(f"No {extension} weights found")
    if kind == ".gguf" and len(weights) > 1:
        names = ", ".join(file.name for file in weights)
        raise NoWeights(f"There is a choice of weights ({names}): download one and give its path")
    templates = (file for file in files if _TEMPLATE.fullmatch(file.name))
    texts = (
        *(file for file in top if _is_text(file.name, kind, trust_remote_code)),
        *sorted(templates, key=lambda file: file.name),
    )
    return Selection(texts, tuple(weights), kind)


def _weights(files: Sequence[RemoteFile], extension: str) -> list[RemoteFile]:
    found = [
        file
        for file in files
        if file.name.endswith(extension) and not any(word in file.name for word in _NO_WEIGHTS)
    ]
    if any(_STANDARD.fullmatch(file.name) for file in found):
        return [
            file
            for file in found
            if _STANDARD.fullmatch(file.name) or file.name.startswith(_EXTRAS)
        ]
    return found


def _is_text(name: str, extension: str, trust_remote_code: bool) -> bool:
    if name.endswith(".index.json"):
        return name.endswith(f"{extension}.index.json")
    if name.endswith(".py"):
        return trust_remote_code
    if any(word in name for word in _NO_TEXTS):
        return False
    return name.endswith(_TEXT_ENDINGS) or name in _TEXT_NAMES
