"""GGUF file -> Hugging Face folder.

Knows llama.cpp's names and layouts and turns them back into a checkpoint's: config.json,
generation_config.json, tokenizer.json, tokenizer_config.json, chat_template.jinja and one
model.safetensors in bfloat16. Tensor by tensor and with numpy alone: neither torch nor a whole
model is ever in memory.
"""

import logging
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np

from kagami_launcher.convert.files import (
    ConversionRefused,
    StoredTensor,
    tokenizers_refusals,
    write_json,
    write_safetensors,
)
from kagami_launcher.convert.gguf_families import (
    GgufFamily,
    check_shapes,
    checkpoint_name,
    dequantized,
    family_of,
    model_config,
)
from kagami_launcher.convert.gguf_file import GgufTensor, open_file
from kagami_launcher.convert.gguf_tokenizer import (
    Metadata,
    build_tokenizer,
    generation_config,
    tokenizer_config,
    vocabulary,
)

log = logging.getLogger(__name__)

_NUMBERS_AT_ONCE = 1 << 22


def unpermute(weight: Any, num_heads: int) -> Any:
    """Undo llama.cpp's order of q and k rows: it rotates neighbours, checkpoints rotate halves."""
    half = weight.shape[0] // num_heads // 2
    pairs = weight.reshape(num_heads, half, 2, *weight.shape[1:])
    return pairs.swapaxes(1, 2).reshape(weight.shape)


@dataclass(frozen=True, slots=True)
class _Placed:
    """A source tensor with its name in the checkpoint."""

    name: str
    source: GgufTensor
    family: GgufFamily

    @property
    def num_bytes(self) -> int:
        return 2 * math.prod(self.source.shape)

    def stored(self, config: Mapping[str, Any]) -> StoredTensor:
        return StoredTensor(
            self.name,
            "BF16",
            self.source.shape,
            self.num_bytes,
            lambda: self.to_bfloat16(config).data,
        )

    def check_type(self) -> None:
        """Refuse a type that the gguf package cannot read, before anything is written."""
        dequantized(replace(self.source, data=self.source.data[:1]))

    def to_bfloat16(self, config: Mapping[str, Any]) -> Any:
        """The weight of a checkpoint; few rows at a time are in memory as float32."""
        rows = self.source.data
        result = np.empty((len(rows), self.source.shape[-1]), "<u2")
        step = max(1, _NUMBERS_AT_ONCE // result.shape[1])
        for start in range(0, len(rows), step):
            part = replace(self.source, data=rows[start : start + step])
            result[start : start + step] = self._rounded(dequantized(part))
        weight = result.reshape(self.source.shape)
        if self.family.swaps_rotary_rows and ".q_proj." in self.name:
            return unpermute(weight, config["num_attention_heads"])
        if self.family.swaps_rotary_rows and ".k_proj." in self.name:
            return unpermute(weight, config["num_key_value_heads"])
        return weight

    def _rounded(self, weight: Any) -> Any:
        """The bits of bfloat16 numbers: to nearest, ties to even."""
        if self.family.adds_one_to_norms and self.name.endswith("norm.weight"):
            weight = weight - 1
        bits = np.ascontiguousarray(weight, dtype=np.float32).view(np.uint32)
        return (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16


def write_weights(
    path: Path, tensors: Mapping[str, GgufTensor], config: Mapping[str, Any], family: GgufFamily
) -> None:
    """Write all tensors as one safetensors file; only one is in memory at a time."""
    placed = [
        _Placed(checkpoint_name(name, family), tensor, family) for name, tensor in tensors.items()
    ]
    for item in placed:
        item.check_type()
    write_safetensors(path, [item.stored(config) for item in placed])


def write_folder(source: Path, folder: Path) -> None:
    """Fill `folder` with the checkpoint that the GGUF file `source` holds."""
    started = time.monotonic()
    found = open_file(source)
    metadata = Metadata(found.values)
    family = family_of(metadata)
    if "token_embd.weight" not in found.tensors:
        raise ConversionRefused("tensor `token_embd.weight` is missing")
    config = model_config(metadata, found.tensors, family)
    tensors = {name: item for name, item in found.tensors.items() if name != "rope_freqs.weight"}
    check_shapes(tensors, config, family)
    if (num_tokens := len(vocabulary(metadata))) > config["vocab_size"]:
        raise ConversionRefused(
            f"`tokenizer.ggml.tokens` has {num_tokens} tokens, and tensor `token_embd.weight` "
            f"{config['vocab_size']} rows"
        )
    with tokenizers_refusals("`tokenizer.ggml`"):
        build_tokenizer(metadata).save(str(folder / "tokenizer.json"))
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", generation_config(metadata))
    write_json(folder / "tokenizer_config.json", tokenizer_config(metadata))
    if template := metadata.text("tokenizer.chat_template", ""):
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    write_weights(folder / "model.safetensors", tensors, config, family)
    log.info("Convert: [1/1] -- Took: %s", timedelta(seconds=time.monotonic() - started))
