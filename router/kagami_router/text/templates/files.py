"""Finds the files of a model's chat templates, and their precedence."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from kagami_proto.model_files import read_optional_object

# The names of the template for requests without tools, and of the one for requests with tools.
DEFAULT, TOOL_USE = "default", "tool_use"
# The longest template known has 60 KB.
_MAX_TEMPLATE_BYTES = 4 << 20


class Source(NamedTuple):
    """One template and the file that contains it."""

    text: str
    path: Path


def sources(folder: Path, given: Path | None) -> tuple[Mapping[str, Source], tuple[Path, ...]]:
    """The templates of a model folder by name, and all paths that were searched.

    `given` is --tokenizer-config-path, a JSON file or a template. For each name the first file that
    has it wins. Raises `ValueError` for a file that is not what its name says, and
    `FileNotFoundError` if `given` does not exist.
    """
    if given is not None and not given.is_file():
        raise FileNotFoundError(f"--tokenizer-config-path {given} does not exist")
    paths = (
        *([given] if given else []),
        folder / "chat_template.jinja",
        folder / "additional_chat_templates",
        folder / "chat_template.json",
        folder / "tokenizer_config.json",
        folder / "processor_config.json",
    )
    found: dict[str, Source] = {}
    for path in paths:
        if path.suffix == ".json" and DEFAULT in found:
            continue  # an older form of the same templates, or one that was replaced
        for name, source in _sources_in(path):
            found.setdefault(name, source)
        if path == given and found:
            break  # the operator's templates, and no others
    return found, paths


def _sources_in(path: Path) -> Iterator[tuple[str, Source]]:
    if path.is_dir():
        for file in sorted(file for file in path.glob("*.jinja") if file.is_file()):
            yield file.stem, Source(_text_in(file), file)
    elif path.suffix == ".jinja":
        if path.is_file():
            yield DEFAULT, Source(_text_in(path), path)
    else:
        for name, text in _in_config(read_optional_object(path).get("chat_template")):
            yield name, Source(text, path)


def _in_config(value: object) -> Iterator[tuple[str, str]]:
    """`chat_template` of a JSON file: a text, `[{"name": …, "template": …}]` or `{name: text}`."""
    if isinstance(value, str):
        yield DEFAULT, value
    elif isinstance(value, dict):
        yield from ((name, one) for name, one in value.items() if isinstance(one, str))
    elif isinstance(value, list):
        for one in value:
            match one:
                case {"name": str(name), "template": str(source)}:
                    yield name, source
                case _:
                    pass


def _text_in(path: Path) -> str:
    if (size := path.stat().st_size) > _MAX_TEMPLATE_BYTES:
        raise ValueError(f"{path} has {size} bytes, the limit is {_MAX_TEMPLATE_BYTES}")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from error
