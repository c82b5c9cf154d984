"""Perplexity of a model under each scheme of weights, on a fixed text in the public domain.

python tests/benchmarks/perplexity.py FOLDER [--quantize none int8 int4 …] [--max-tokens N]

FOLDER is a model's folder as the launcher makes it (the embedded model lies in the hub cache). The
text is cut into windows that are scored one by one, every token but a window's first.
"""

import argparse
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tests.fakes.batches import Runner
from tokenizers import Tokenizer
from torch.nn.functional import cross_entropy

from kagami_shard.models.base import Model
from kagami_shard.models.registry import load_model

TEXT = Path(__file__).parents[1] / "texts" / "devils_dictionary.txt"
WINDOW = 512


def windows(folder: Path, max_tokens: int) -> Iterator[list[int]]:
    """The ids of `TEXT`, a window at a time."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    ids = tokenizer.encode(TEXT.read_text(encoding="utf-8"), add_special_tokens=False).ids
    ids = ids[:max_tokens]
    for first in range(0, len(ids) - 1, WINDOW):
        yield ids[first : first + WINDOW]


def perplexity(model: Model, folder: Path, max_tokens: int, dtype: torch.dtype) -> float:
    """Of all scored tokens together."""
    loss, count = 0.0, 0
    for ids in windows(folder, max_tokens):
        runner = Runner(model, num_blocks=2 + WINDOW // 32, block_size=32, dtype=dtype)
        (logits,) = runner.step((runner.add(ids), len(ids)))
        loss += float(cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="sum"))
        count += len(ids) - 1
    return math.exp(loss / count)


def measure(folder: Path, quantize: str | None, max_tokens: int) -> float:
    """The perplexity of the model in `folder` in bfloat16, under a value of --quantize."""
    dtype = torch.bfloat16
    model = load_model(folder, dtype=dtype, device=torch.device("cpu"), quantize=quantize)
    return perplexity(model, folder, max_tokens, dtype)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--quantize", nargs="+", default=["none", "int8", "int4", "fp8"])
    parser.add_argument("--max-tokens", type=int, default=1 << 30)
    args = parser.parse_args()
    base = None
    for scheme in args.quantize:
        started = time.monotonic()
        value = measure(args.folder, None if scheme == "none" else scheme, args.max_tokens)
        base = base or value
        change = 100 * (value / base - 1)
        print(f"{scheme:20} {value:9.4f} {change:+7.3f} %  {time.monotonic() - started:5.1f} s")


if __name__ == "__main__":
    main()
