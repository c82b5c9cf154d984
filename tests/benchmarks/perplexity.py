"""Perplexity of a model under each scheme of weights, on a fixed text in the public domain.

python tests/benchmarks/perplexity.py FOLDER [--quantize none int8 int4 …] [--max-tokens N]

FOLDER is a model's folder as the launcher makes it (the embedded model lies in the hub cache). The
text is cut into windows that are scored one by one, every token but a window's first: in torch, and
where the CPU's library can run in the native step that serves, from the same loaded weights.
"""

import argparse
import math
import os
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from tests.fakes.batches import Runner
from tokenizers import Tokenizer
from torch.nn.functional import cross_entropy

from kagami_shard import cli
from kagami_shard.backends.base import Backend
from kagami_shard.backends.native.build import build, find_compiler
from kagami_shard.backends.native.cpu import cpu_is_supported
from kagami_shard.backends.native.library import Library
from kagami_shard.backends.native.model import RecordedDecoder
from kagami_shard.backends.native.runner import NativeBackend
from kagami_shard.backends.native.runtime import Runtime
from kagami_shard.backends.torch.load import load_torch
from kagami_shard.models.decoder import Decoder

TEXT = Path(__file__).parents[1] / "texts" / "devils_dictionary.txt"
WINDOW = 512
DTYPE = torch.bfloat16


class Perplexities(NamedTuple):
    """Perplexities of one model, computed by torch and by the native library."""

    torch: float
    native: float
    """NaN where the library cannot run"""


def native_runtime() -> Runtime | None:
    """The library as a shard loads it, on all cores; None where it cannot run."""
    if not cpu_is_supported() or find_compiler() is None:
        return None
    return Runtime(Library(build(cli.cache_folder(os.environ))), os.cpu_count() or 1)


def windows(folder: Path, max_tokens: int) -> Iterator[list[int]]:
    """The ids of `TEXT`, a window at a time."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = tokenizer.encode(TEXT.read_text(encoding="utf-8"), add_special_tokens=False).ids
    ids = ids[:max_tokens]
    for first in range(0, len(ids) - 1, WINDOW):
        yield ids[first : first + WINDOW]


def perplexity(backend: Backend, texts: Iterable[list[int]]) -> float:
    """The perplexity of all scored tokens together."""
    loss, count = 0.0, 0
    for ids in texts:
        num_blocks = 2 + WINDOW // 32
        runner = Runner(backend, num_blocks=num_blocks, block_size=32)
        (logits,) = runner.step((runner.add(ids), len(ids)))
        targets = torch.tensor(ids[1:])
        loss += float(cross_entropy(logits[:-1].float(), targets, reduction="sum"))
        count += len(ids) - 1
    return math.exp(loss / count)


def measure(
    folder: Path,
    quantize: str | None,
    runtime: Runtime | None,
    *,
    torch_tokens: int,
    native_tokens: int,
) -> Perplexities:
    """The model in `folder`, in bfloat16 or under a value of --quantize, on so many tokens."""
    backend = load_torch(folder, dtype=DTYPE, device=torch.device("cpu"), quantize=quantize)
    reference = perplexity(backend, windows(folder, torch_tokens))
    if runtime is None:
        return Perplexities(reference, math.nan)
    assert isinstance(backend.model, Decoder)
    # Takes the weights: the backend above computes no more.
    native = NativeBackend(RecordedDecoder(backend.model, runtime), runtime)
    return Perplexities(reference, perplexity(native, windows(folder, native_tokens)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--quantize", nargs="+", default=["none", "int8", "int4", "fp8"])
    parser.add_argument("--max-tokens", type=int, default=1 << 30)
    args = parser.parse_args()
    base, runtime = None, native_runtime()
    for scheme in args.quantize:
        started = time.monotonic()
        quantize = None if scheme == "none" else scheme
        found = measure(
            args.folder,
            quantize,
            runtime,
            torch_tokens=args.max_tokens,
            native_tokens=args.max_tokens,
        )
        base = base or found
        columns = [
            f"{name} {value:9.4f} {100 * (value / first - 1):+7.3f} %"
            for name, value, first in zip(found._fields, found, base, strict=True)
        ]
        print(f"{scheme:20} {'   '.join(columns)}  {time.monotonic() - started:5.1f} s")


if __name__ == "__main__":
    main()
