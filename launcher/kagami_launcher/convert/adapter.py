"""A PEFT adapter and its base model -> one model: W + scale · B A (LoRA, arXiv:2106.09685).

Computed in float32 and stored in the base's dtype, one weight at a time: it needs neither the peft
library nor a whole model in memory. A part of an adapter that has no place in the base is refused:
an adapter that is applied in part gives wrong answers without an error.
"""

import logging
import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from kagami_launcher.convert.files import (
    ConversionRefused,
    StoredTensor,
    write_index,
    write_json,
    write_safetensors,
)
from kagami_launcher.convert.pickles import as_bytes, dtype_name, read_pickle
from kagami_launcher.model import folder as model_folder
from kagami_proto.model_files import read_object

log = logging.getLogger(__name__)

_PREFIX = "base_model.model."
# An adapter's key: the module it changes, and which part of the change this is.
_PART = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|"
    r"lora_magnitude_vector)(?:\.default)?(?P<kind>\.weight|\.bias)?$"
)
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
# Initializations of a training that leave the base's own weights as they are.
_HARMLESS_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
_NOT_MERGED = (
    "layer_replication",
    "use_qalora",
    "alora_invocation_tokens",
    "trainable_token_indices",
)


@dataclass(slots=True)
class _Update:
    """What is added to one weight."""

    module: str
    parts: dict[str, Tensor] = field(default_factory=dict)

    def apply(self, weight: Tensor, config: Mapping[str, Any]) -> Tensor:
        """The changed weight in float32."""
        down, up = self._pair()
        scale = _scale(self.module, down.shape[0], config)
        delta = (up.float() @ down.float()) * scale
        if "lora_embedding_A" in self.parts or config.get("fan_in_fan_out"):
            delta = delta.T
        if delta.shape != weight.shape:
            raise ConversionRefused(
                f"{self.module} is {list(weight.shape)} in the base model, and its adapter "
                f"{list(delta.shape)}"
            )
        changed = weight.float() + delta
        if (magnitude := self.parts.get("lora_magnitude_vector")) is not None:
            if config.get("fan_in_fan_out") or "lora_embedding_A" in self.parts:
                raise ConversionRefused(f"{self.module}: a magnitude on a transposed weight")
            changed *= (magnitude.float().flatten() / changed.norm(dim=1))[:, None]  # 2402.09353
        return changed

    def _pair(self) -> tuple[Tensor, Tensor]:
        for first, second in (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B")):
            if first in self.parts and second in self.parts:
                down, up = self.parts[first], self.parts[second]
                if down.ndim == 2 and up.ndim == 2:
                    return down, up
        raise ConversionRefused(f"the adapter of {self.module} is not two matrices")


def _scale(module: str, rank: int, config: Mapping[str, Any]) -> float:
    alpha = config.get("lora_alpha", 8)
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            alpha = value
            break
    return float(alpha / (rank**0.5 if config.get("use_rslora") else rank))


@dataclass(frozen=True, slots=True)
class _Adapter:
    """What an adapter does to its base: weights it adds to, and weights it replaces."""

    config: Mapping[str, Any]
    updates: Mapping[str, _Update]
    replacements: Mapping[str, Tensor]

    @classmethod
    def read(cls, folder: Path) -> "_Adapter":
        config = read_object(folder / model_folder.ADAPTER_CONFIG)
        _check(config)
        updates: dict[str, _Update] = {}
        replacements: dict[str, Tensor] = {}
        for key, tensor in _adapter_weights(folder).items():
            name = key.removeprefix(_PREFIX)
            if found := _PART.match(name):
                if found["kind"] == ".bias":
                    raise ConversionRefused(f"{key}: an adapter with a bias of its own")
                module = found["module"]
                update = updates.setdefault(f"{module}.weight", _Update(module))
                update.parts[found["part"]] = tensor
            else:
                replacements[re.sub(r"\.(modules_to_save(\.default)?|base_layer)", "", name)] = (
                    tensor
                )
        return cls(config, updates, replacements)

    def onto(self, names: set[str]) -> "_Adapter":
        """The same with the base's own names, which may lack the model's outer name."""

        def own(name: str) -> str:
            inner = name.partition(".")[2]
            if name in names or (name == "lm_head.weight" and name in self.replacements):
                return name
            if inner in names:
                return inner
            raise ConversionRefused(f"the adapter changes {name}, and the base model has none")

        return _Adapter(
            self.config,
            {own(name): update for name, update in self.updates.items()},
            {own(name): tensor for name, tensor in self.replacements.items()},
        )


def _check(config: Mapping[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ConversionRefused(f"adapters of type {kind} cannot be merged, only LORA")
    if (start := config.get("init_lora_weights")) not in _HARMLESS_STARTS:
        raise ConversionRefused(f"`init_lora_weights` {start} changes the base model's weights")
    for name in _NOT_MERGED:
        if config.get(name):
            raise ConversionRefused(f"`{name}` of adapter_config.json is not supported yet")


def _adapter_weights(folder: Path) -> Mapping[str, Tensor]:
    path = folder / "adapter_model.safetensors"
    if path.is_file():
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}
    path = folder / "adapter_model.bin"
    if not path.is_file():
        raise ConversionRefused(f"neither adapter_model.safetensors nor .bin in {folder}")
    return read_pickle(path)


def merge(adapter: Path, base: Path, folder: Path, *, destination: Path) -> None:
    """Fill `folder`, which is to become `destination`, with the base changed by the adapter."""
    log.info("Trying to load a Peft model. It might take a while without feedback")
    change = _Adapter.read(adapter)
    log.info("Peft model detected.")
    _copy_side_files(adapter, base, folder)
    log.info("Merging the lora weights.")
    with ExitStack() as stack:
        files = [_read_lazily(file, stack) for file in model_folder.weight_files(base)]
        change = change.onto({name for file in files for name in file})
        log.info("Saving the newly created merged model to %s", destination)
        names = []
        for number, file in enumerate(files, 1):
            is_last = number == len(files)
            suffix = f"-{number:05d}-of-{len(files):05d}" if len(files) > 1 else ""
            names.append(f"model{suffix}.safetensors")
            extra = _new_head(change, files) if is_last else {}
            write_safetensors(folder / names[-1], _merged({**file, **extra}, change))
    if len(names) > 1:
        write_index(folder, names)
    _adapt_config(folder, change, {name: lazy for file in files for name, lazy in file.items()})


@dataclass(frozen=True, slots=True)
class _Lazy:
    """A weight of the base, read when asked for."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]


def _read_lazily(file: Path, stack: ExitStack) -> dict[str, _Lazy]:
    if file.suffix != ".safetensors":
        return {name: _lazy(tensor) for name, tensor in read_pickle(file).items()}
    handle = stack.enter_context(safe_open(file, framework="pt"))
    found = {}
    for name in handle.keys():
        part = handle.get_slice(name)
        empty = part[:0] if part.get_shape() else handle.get_tensor(name)
        read = partial(handle.get_tensor, name)
        found[name] = _Lazy(empty.dtype, tuple(part.get_shape()), read)
    return found


def _lazy(tensor: Tensor) -> _Lazy:
    return _Lazy(tensor.dtype, tuple(tensor.shape), lambda: tensor)


def _new_head(change: _Adapter, files: list[dict[str, _Lazy]]) -> dict[str, _Lazy]:
    """A head that the adapter adds to a base without a head of its own."""
    head = change.replacements.get("lm_head.weight")
    if head is None or any("lm_head.weight" in file for file in files):
        return {}
    return {"lm_head.weight": _lazy(head)}


def _merged(file: Mapping[str, _Lazy], change: _Adapter) -> list[StoredTensor]:
    def stored(name: str, lazy: _Lazy) -> StoredTensor:
        replacement = change.replacements.get(name)
        shape = lazy.shape if replacement is None else tuple(replacement.shape)
        num_bytes = torch.Size(shape).numel() * lazy.dtype.itemsize

        def data() -> Any:
            weight = lazy.read() if replacement is None else replacement
            if update := change.updates.get(name):
                weight = update.apply(weight, change.config)
            return as_bytes(weight.to(lazy.dtype)).numpy()

        return StoredTensor(name, dtype_name(lazy.dtype), shape, num_bytes, data)

    return [stored(name, lazy) for name, lazy in file.items()]


def _copy_side_files(adapter: Path, base: Path, folder: Path) -> None:
    """The base's settings; the tokenizer is the adapter's if it has one."""
    has_tokenizer = any((adapter / f"tokenizer.{kind}").is_file() for kind in ("json", "model"))
    for file in model_folder.side_files(base):
        if not (has_tokenizer and file.name in _TOKENIZER_FILES):
            shutil.copyfile(file, folder / file.name)
    for name in _TOKENIZER_FILES if has_tokenizer else ():
        if (adapter / name).is_file():
            shutil.copyfile(adapter / name, folder / name)


def _adapt_config(folder: Path, change: _Adapter, base: Mapping[str, _Lazy]) -> None:
    """Write into config.json what the adapter changed: the vocabulary's size, an own head."""
    config = dict(read_object(folder / "config.json"))
    before = dict(config)
    if "lm_head.weight" in change.replacements and "lm_head.weight" not in base:
        config["tie_word_embeddings"] = False
    for name, tensor in change.replacements.items():
        if name.endswith(("embed_tokens.weight", "wte.weight")) and "vocab_size" in config:
            config["vocab_size"] = tensor.shape[0]
    if config != before:
        write_json(folder / "config.json", config)
