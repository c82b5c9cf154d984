"""The conversion child: `python -m kagami_launcher.convert SOURCE DESTINATION`.

Makes DESTINATION a folder that the shard and the router can read:

    a .gguf file                 -> a new folder
    a folder with an adapter     -> a new folder, merged into --base
    a folder with .bin, .pt or tokenizer.model
                                 -> the missing files in it, or in a new folder with the rest of it

A new folder appears by one rename. Each file in an existing folder appears by one rename, too. So a
kill leaves nothing that looks finished. torch is imported only where pickles or adapters are read.
"""

import argparse
import logging
import shutil
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from kagami_launcher.convert import gguf as convert_gguf
from kagami_launcher.convert.files import ConversionRefused, copy_side_file, new_folder, only_one
from kagami_launcher.convert.sentencepiece_model import write_tokenizer
from kagami_launcher.model import folder as model_folder
from kagami_proto import logs
from kagami_proto.panics import exception_of

log = logging.getLogger(__name__)

# TGI 2.0's, word for word: operators grep for it.
_UNSAFE = (
    "🚨🚨BREAKING CHANGE in 2.0🚨🚨: Safetensors conversion is disabled without "
    "`--trust-remote-code` because Pickle files are unsafe and can essentially contain remote code "
    "execution!Please check for more information here: "
    "https://huggingface.co/docs/text-generation-inference/basic_tutorials/safety"
)


@dataclass(frozen=True, slots=True)
class Task:
    """What to make from what, and the name that the operator gave."""

    source: Path
    destination: Path
    base: Path | None = None  # the model that the adapter in `source` belongs to
    model_id: str = ""
    revision: str | None = None
    trust_remote_code: bool = False


def convert(task: Task) -> None:
    """Make the destination, unless it is there already; raises `ConversionRefused`, `OSError`."""
    if task.source == task.destination:
        with only_one(task.destination):
            _complete(task, task.destination)
        return
    with new_folder(task.destination) as folder:
        if folder is None:
            return
        if task.source.is_file():
            convert_gguf.write_folder(task.source, folder)
        elif task.base is not None:
            import_module("kagami_launcher.convert.adapter").merge(
                task.source, task.base, folder, destination=task.destination
            )
            _complete(task, folder)
        else:
            for file in model_folder.side_files(task.source):
                copy_side_file(file, folder)
            _complete(task, folder)


def _complete(task: Task, folder: Path) -> None:
    """Make what is missing of weights and tokenizer in `folder`."""
    if not (folder / "tokenizer.json").is_file():
        write_tokenizer(folder, folder)  # takes a second; a refusal is better early
    if not model_folder.missing_weights(folder):
        return
    if not model_folder.missing_weights(task.source):
        for file in model_folder.weight_files(task.source):
            (folder / file.name).symlink_to(file)
        index = task.source / model_folder.INDEX
        if index.is_file():
            shutil.copyfile(index, folder / index.name)
        return
    if not task.trust_remote_code:
        log.warning(_UNSAFE)
    log.warning(
        "No safetensors weights found for model %s at revision %s. "
        "Converting PyTorch weights to safetensors.",
        task.model_id,
        task.revision,
    )
    import_module("kagami_launcher.convert.pickles").convert_weights(task.source, folder)


def main(arguments: Sequence[str]) -> int:
    """Convert; a refusal is one ERROR line and exit code 1."""
    logs.configure("text_generation_launcher", level="info", json_output=True)
    task = _parse(arguments)
    try:
        convert(task)
    except BaseException as raised:  # the border of this process: files can cause anything
        error = exception_of(raised)
        log.error("Cannot convert %s: %s", task.source, _reason(error))
        return 1
    return 0


def _reason(error: Exception) -> str:
    """In one line; of what was not meant for an operator the kind and the place are said too."""
    text = " ".join(str(error).split())[:1000]
    place = traceback.extract_tb(error.__traceback__)
    if isinstance(error, ConversionRefused | OSError | ValueError) or not place:
        return text
    return f"{type(error).__name__}: {text} ({Path(place[-1].filename).name}:{place[-1].lineno})"


def _parse(arguments: Sequence[str]) -> Task:
    parser = argparse.ArgumentParser(prog="python -m kagami_launcher.convert")
    parser.add_argument("source", type=Path)
    parser.add_argument("destination", type=Path)
    parser.add_argument("--base", type=Path)
    parser.add_argument("--model-id", default="")
    parser.add_argument("--revision")
    parser.add_argument("--trust-remote-code", action="store_true")
    return Task(**vars(parser.parse_args(arguments)))
