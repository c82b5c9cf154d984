"""The hub cache: where it lies, and what of a model is in it. Asks no network.

The layout is huggingface_hub's, shared with all Hugging Face tools:

    models--{org}--{name}/
        refs/{revision}           the commit that the revision named last
        blobs/{etag}              content
        snapshots/{commit}/{file} links to blobs
"""

import re
from collections.abc import Mapping
from pathlib import Path

from kagami_proto.model_files import BrokenFile, read_index, read_object

# The preferred one first.
WEIGHT_EXTENSIONS = (".safetensors", ".bin", ".pt", ".gguf")
_COMMIT = re.compile(r"[0-9a-f]{40}")
# Git's own rules are looser, but none of its names has these parts.
_REVISION = re.compile(r"(?!.*\.\.)(?!/)[^\0-\x20\x7f~^:?*\[\\]{1,200}")
_OFFLINE_VARIABLES = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")


class ModelNotFound(Exception):
    """There is nothing to serve under this name; the text says what to do."""


def cache_folder(flag: str | None, environ: Mapping[str, str]) -> Path:
    """The hub cache, by the rules of huggingface_hub; the flag comes before all of them."""
    if chosen := (flag or environ.get("HUGGINGFACE_HUB_CACHE") or environ.get("HF_HUB_CACHE")):
        return Path(chosen).expanduser()
    if home := environ.get("HF_HOME"):
        return Path(home).expanduser() / "hub"
    base = environ.get("XDG_CACHE_HOME") or Path(environ.get("HOME") or "~") / ".cache"
    return Path(base).expanduser() / "huggingface" / "hub"


def is_offline(environ: Mapping[str, str]) -> bool:
    """Whether the network is forbidden; spelled as huggingface_hub reads it."""
    value = next((environ[name] for name in _OFFLINE_VARIABLES if environ.get(name)), "")
    return value.upper() in ("1", "ON", "YES", "TRUE")


def is_pinned(revision: str | None) -> bool:
    """Whether the revision is a commit, which never changes."""
    return revision is not None and _COMMIT.fullmatch(revision) is not None


def is_revision(value: object) -> bool:
    """Whether it can be a branch, a tag or a commit: it becomes a path below `refs`."""
    return isinstance(value, str) and _REVISION.fullmatch(value) is not None


def repository_folder(cache: Path, model_id: str) -> Path:
    """Where the hub cache keeps everything of one model."""
    return cache / ("models--" + model_id.replace("/", "--"))


def cached_snapshot(model_id: str, revision: str | None, cache: Path) -> Path:
    """The snapshot that the hub cache has of a revision, all of it; raises `ModelNotFound`."""
    repository = repository_folder(cache, model_id)
    wanted = revision or "main"
    reference = repository / "refs" / wanted
    commit = reference.read_text().strip() if reference.is_file() else wanted
    snapshot = repository / "snapshots" / commit
    if not _has_weights(snapshot):
        raise ModelNotFound(not_cached(model_id, revision, cache))
    return snapshot


def _has_weights(folder: Path) -> bool:
    """Whether the folder has one kind of weights, and all of its files.

    The hub's tools put a file there when it is complete, so one that exists is whole.
    """
    for extension in WEIGHT_EXTENSIONS:
        indexes = list(folder.glob(f"*{extension}.index.json"))
        if any(not lost_files(index) for index in indexes):
            return True
        if not indexes and any(folder.glob(f"*{extension}")):
            return True
    return False


def lost_files(index: Path) -> list[str]:
    """The weight files that an index names and that are not beside it."""
    try:
        names = sorted(set(read_index(index).values()))
    except BrokenFile as broken:
        raise ModelNotFound(str(broken)) from broken
    return [name for name in names if not (index.parent / name).is_file()]


def will_do(
    model_id: str, revision: str | None, cache: Path, *, is_offline: bool, trust_remote_code: bool
) -> bool:
    """Whether the cache has all the files, so that the hub need not be asked.

    With a network, only a commit's files are known to be the right ones. Raises `ModelNotFound`
    if the hub must not be asked and the cache does not have the model.
    """
    if not is_offline and not is_pinned(revision):
        return False
    try:
        snapshot = cached_snapshot(model_id, revision, cache)
    except ModelNotFound:
        if is_offline:
            text = not_cached(model_id, revision, cache, is_offline=True)
            raise ModelNotFound(text) from None
        return False
    return is_offline or _is_self_contained(snapshot, trust_remote_code)


def _is_self_contained(snapshot: Path, trust_remote_code: bool) -> bool:
    """Whether the folder needs no files of other repositories: no base model, no code to run."""
    if (snapshot / "adapter_config.json").is_file():
        return False
    return not trust_remote_code or not _lost_code(snapshot / "config.json")


def _lost_code(config: Path) -> list[str]:
    """The Python files that a config.json names and that are not beside it."""
    try:
        modules = read_object(config).get("auto_map")
    except BrokenFile:
        return []
    names = modules.values() if isinstance(modules, dict) else ()
    files = [f"{name.partition('.')[0]}.py" for name in names if isinstance(name, str)]
    # `other/model--file.Class` is the code of another repository.
    return [file for file in files if "--" not in file and not (config.parent / file).is_file()]


def not_cached(
    model_id: str, revision: str | None, cache: Path, *, is_offline: bool = False
) -> str:
    """The line for a model that the cache does not have, and what to do."""
    advice = f"run `text-generation-server download-weights {model_id}` with a network"
    if is_offline:
        advice += ", or unset HF_HUB_OFFLINE and TRANSFORMERS_OFFLINE"
    return (
        f"model {model_id} at revision {revision or 'main'} is not in the hub cache {cache}: "
        f"{advice}"
    )
