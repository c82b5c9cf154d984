"""A PEFT adapter and its base model -> one model: W + scale · B A (LoRA, arXiv:2106.09685).

Computed in float32 and stored in the base's dtype, one weight at a time: it needs neither the peft
library nor a whole model in memory. A part of an adapter that has no place in the base is refused:
an adapter that is applied in part gives wrong answers without an error.
"""

import logging
import re
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kagami_launcher.convert.files import (
    ConversionRefused,
    StoredTensor,
    copy_side_file,
    open_safetensors,
    shown,
    write_index,
    write_json,
    write_safetensors,
)
from kagami_launcher.convert.module_patterns import ModulePatterns
from kagami_launcher.convert.pickles import as_bytes, dtype_name, is_dtype, read_pickle
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
_MAX_ALPHA = 1e6  # trainings use 8 to 512
# Initializations of a training that leave the base's own weights as they are.
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight")
_VOCABULARY = (*_EMBEDDINGS, "lm_head.weight")
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
    alpha: object
    parts: dict[str, Tensor] = field(default_factory=dict)

    def apply(self, weight: Tensor, config: Mapping[str, Any]) -> Tensor:
        """The changed weight in float32; `check` has compared the shapes."""
        down, up = self._pair()
        delta = (up.float() @ down.float()) * self._scale(down.shape[0], config)
        if self._is_transposed(config):
            delta = delta.T
        changed = weight.float() + delta
        if (magnitude := self.parts.get("lora_magnitude_vector")) is not None:
            changed *= (magnitude.float().flatten() / changed.norm(dim=1))[:, None]  # 2402.09353
        return changed

    def check(self, shape: tuple[int, ...], config: Mapping[str, Any]) -> None:
        """Refuse what does not fit a weight of this shape, before anything is multiplied."""
        what = shown(self.module)
        down, up = self._pair()
        if down.shape[0] != up.shape[1] or not down.shape[0]:
            raise ConversionRefused(
                f"the adapter of {what} has matrices {list(down.shape)} and {list(up.shape)}: "
                "their rank differs, or is 0"
            )
        delta = (up.shape[0], down.shape[1])
        is_transposed = self._is_transposed(config)
        if shape != (delta[::-1] if is_transposed else delta):
            raise ConversionRefused(
                f"{what} is {list(shape)} in the base model, and its adapter {list(delta)}"
            )
        if (magnitude := self.parts.get("lora_magnitude_vector")) is not None:
            if is_transposed:
                raise ConversionRefused(f"{what}: a magnitude on a transposed weight")
            if magnitude.numel() != shape[0]:
                raise ConversionRefused(
                    f"{what} has {shape[0]} rows, and its magnitude {list(magnitude.shape)}"
                )
        self._scale(down.shape[0], config)

    def _scale(self, rank: int, config: Mapping[str, Any]) -> float:
        alpha = self.alpha
        if not isinstance(alpha, int | float) or not abs(alpha) < _MAX_ALPHA:
            raise ConversionRefused(
                f"alpha of {shown(self.module)} is {shown(alpha)}, expected a number"
            )
        return float(alpha / (rank**0.5 if config.get("use_rslora") else rank))

    def _is_transposed(self, config: Mapping[str, Any]) -> bool:
        return "lora_embedding_A" in self.parts or bool(config.get("fan_in_fan_out"))

    def _pair(self) -> tuple[Tensor, Tensor]:
        for first, second in (("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B")):
            if first in self.parts and second in self.parts:
                down, up = self.parts[first], self.parts[second]
                if down.ndim == 2 and up.ndim == 2:
                    return down, up
        raise ConversionRefused(f"the adapter of {shown(self.module)} is not two matrices")


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
        where = f"`alpha_pattern` of {folder / model_folder.ADAPTER_CONFIG}"
        alphas = ModulePatterns(config.get("alpha_pattern") or {}, where)
        alpha = config.get("lora_alpha", 8)
        updates: dict[str, _Update] = {}
        replacements: dict[str, Tensor] = {}
        for key, tensor in _adapter_weights(folder).items():
            name = key.removeprefix(_PREFIX)
            if found := _PART.match(name):
                if found["kind"] == ".bias":
                    raise ConversionRefused(f"{shown(key)}: an adapter with a bias of its own")
                module = found["module"]
                weight = f"{module}.weight"
                if weight not in updates:
                    updates[weight] = _Update(module, alphas.value(module, alpha))
                updates[weight].parts[found["part"]] = tensor
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
            raise ConversionRefused(f"the adapter changes {shown(name)}, and the base has none")

        return _Adapter(
            self.config,
            {own(name): update for name, update in self.updates.items()},
            {own(name): tensor for name, tensor in self.replacements.items()},
        )

    def check(self, base: Mapping[str, "_Lazy"]) -> None:
        """Refuse an adapter with a part whose shape the base has not."""
        for name, update in self.updates.items():
            replaced = self.replacements.get(name)
            update.check(
                base[name].shape if replaced is None else tuple(replaced.shape), self.config
            )
        for name, tensor in self.replacements.items():
            # Only a vocabulary may have grown, or the head of a base that has none be new.
            shape = base[name].shape if name in base else ()
            is_vocabulary = name.endswith(_VOCABULARY) and tensor.ndim == 2 and len(tensor)
            if tuple(tensor.shape) != shape and not (
                is_vocabulary and tuple(tensor.shape[1:]) == (shape[1:] or tensor.shape[1:])
            ):
                raise ConversionRefused(
                    f"{shown(name)} is {list(shape)} in the base model, and in the adapter "
                    f"{list(tensor.shape)}"
                )


def _check(config: Mapping[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise ConversionRefused(f"adapters of type {shown(kind)} cannot be merged, only LORA")
    if (start := config.get("init_lora_weights")) not in _HARMLESS_STARTS:
        raise ConversionRefused(
            f"`init_lora_weights` {shown(start)} changes the base model's weights"
        )
    for name in _NOT_MERGED:
        if config.get(name):
            raise ConversionRefused(f"`{name}` of adapter_config.json is not supported yet")
    if not isinstance(patterns := config.get("alpha_pattern") or {}, dict):
        raise ConversionRefused(
            f"`alpha_pattern` of adapter_config.json is {shown(patterns)}, expected an object"
        )


def _adapter_weights(folder: Path) -> Mapping[str, Tensor]:
    path = folder / "adapter_model.safetensors"
    if path.is_file():
        with open_safetensors(path, "pt") as file:
            return {name: file.get_tensor(name) for name in _names(file, path)}
    path = folder / "adapter_model.bin"
    if not path.is_file():
        raise ConversionRefused(f"neither adapter_model.safetensors nor .bin in {folder}")
    return read_pickle(path)


def _names(file: Any, path: Path) -> list[str]:
    """The tensors of an open file, all of which are of dtypes that weights have."""
    names: list[str] = list(file.keys())
    for name in names:
        if not is_dtype(dtype := file.get_slice(name).get_dtype()):
            raise ConversionRefused(f"{path.name}: {shown(name)} has dtype {dtype}")
    return names


def merge(adapter: Path, base: Path, folder: Path, *, destination: Path) -> None:
    """Fill `folder`, which is to become `destination`, with the base changed by the adapter."""
    log.info("Trying to load a Peft model. It might take a while without feedback")
    change = _Adapter.read(adapter)
    log.info("Peft model detected.")
    _copy_side_files(adapter, base, folder)
    log.info("Merging the lora weights.")
    with ExitStack() as stack:
        files = [_read_lazily(file, stack) for file in model_folder.weight_files(base)]
        weights = {name: lazy for file in files for name, lazy in file.items()}
        change = change.onto(set(weights))
        change.check(weights)
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
    _adapt_config(folder, change, weights)


@dataclass(frozen=True, slots=True)
class _Lazy:
    """A weight of the base, read when asked for."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]


def _read_lazily(file: Path, stack: ExitStack) -> dict[str, _Lazy]:
    if file.suffix != ".safetensors":
        return {name: _lazy(tensor) for name, tensor in read_pickle(file).items()}
    handle = stack.enter_context(open_safetensors(file, "pt"))
    found = {}
    for name in _names(handle, file):
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
            copy_side_file(file, folder)
    for name in _TOKENIZER_FILES if has_tokenizer else ():
        if (adapter / name).is_file():
            copy_side_file(adapter / name, folder)


def _adapt_config(folder: Path, change: _Adapter, base: Mapping[str, _Lazy]) -> None:
    """Write into config.json what the adapter changed: the vocabulary's size, an own head."""
    config = dict(read_object(folder / "config.json"))
    before = dict(config)
    if "lm_head.weight" in change.replacements and "lm_head.weight" not in base:
        config["tie_word_embeddings"] = False
    for name, tensor in change.replacements.items():
        if name.endswith(_EMBEDDINGS) and "vocab_size" in config:
            config["vocab_size"] = tensor.shape[0]
    if config != before:
        write_json(folder / "config.json", config)
