"""Families as a tape of the CPU's library."""

import os
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.fakes.batches import CPU, FakeSequence, Runner, build_batch
from tests.fakes.native import needs_library
from tests.shard.models.parity import prompts, relative_error
from tests.shard.models.test_decoder import CONFIGS

from kagami_shard import cli
from kagami_shard.backends.native.build import build
from kagami_shard.backends.native.library import Library
from kagami_shard.backends.native.model import RecordedDecoder
from kagami_shard.backends.native.runner import NativeBackend
from kagami_shard.backends.native.runtime import Runtime
from kagami_shard.backends.torch.load import load_torch
from kagami_shard.forward.output import OutputKind
from kagami_shard.models.decoder import Decoder


@pytest.fixture(scope="module")
def runtime() -> Runtime:
    needs_library()
    return Runtime(Library(build(cli.cache_folder(os.environ))), 2)


def decoder_of(folder: Path, **options: Any) -> Decoder:
    decoder = load_torch(folder, dtype=torch.bfloat16, device=CPU, **options).model
    assert isinstance(decoder, Decoder)
    return decoder


def recorded(folder: Path, runtime: Runtime, *, defers: bool = True) -> NativeBackend:
    return NativeBackend(RecordedDecoder(decoder_of(folder, defers=defers), runtime), runtime)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_recorded_family_is_as_near_as_bfloat16_can_be(
    name: str, runtime: Runtime, save_checkpoint: Callable[..., tuple]
) -> None:
    folder, reference = save_checkpoint(CONFIGS[name])
    tokens = prompts(reference.config.get_text_config().vocab_size)
    runner = Runner(recorded(folder, runtime))
    assert relative_error(runner, reference, tokens) < 0.05


def test_a_step_larger_than_all_before_grows_the_buffers(
    runtime: Runtime, save_checkpoint: Callable[..., tuple]
) -> None:
    folder, _ = save_checkpoint(CONFIGS["llama"])
    runner = Runner(recorded(folder, runtime))
    first, second = runner.add(range(3)), runner.add([*range(3), *range(50)])
    few = runner.step((first, 3))[0].clone()
    many = runner.step((second, 53))[0]
    assert torch.equal(few, many[:3])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "gemma2", "starcoder2"])
def test_weights_packed_from_their_files_are_those_packed_from_memory(
    name: str, dtype: torch.dtype, runtime: Runtime, save_checkpoint: Callable[..., tuple]
) -> None:
    folder, reference = save_checkpoint(CONFIGS[name])
    reference.to(dtype).save_pretrained(folder)
    logits = []
    for defers in (False, True):
        model = recorded(folder, runtime, defers=defers)
        runner = Runner(model)
        logits.append(runner.step((runner.add(range(9)), 9))[0].clone())
    assert torch.equal(*logits)


@pytest.mark.parametrize("quantize", [None, "int8"])
@pytest.mark.parametrize("is_tied", [False, True])
def test_a_table_that_is_not_the_head_is_not_read_whole(
    is_tied: bool, quantize: str | None, runtime: Runtime, save_checkpoint: Callable[..., tuple]
) -> None:
    config = deepcopy(CONFIGS["llama"])
    config.update({"vocab_size": 50_000, "tie_word_embeddings": is_tied})
    folder, _ = save_checkpoint(config)
    model = RecordedDecoder(decoder_of(folder, quantize=quantize), runtime)
    head = 50_000 * config.hidden_size  # its numbers
    assert head * (1 if quantize else 2) <= model.weight_bytes < 3 * head


def test_a_chunk_in_the_middle_of_a_prompt_wants_no_logits(
    runtime: Runtime, save_checkpoint: Callable[..., tuple]
) -> None:
    folder, _ = save_checkpoint(CONFIGS["llama"])
    backend = recorded(folder, runtime)
    cache = backend.new_cache(16, 4)
    silent = build_batch([(FakeSequence([5] * 20, [3, 1, 2, 4, 6]), 20)], 4, rows=[])
    logits = backend.run(silent, cache, OutputKind.LOGITS).logits
    assert logits is not None
    assert logits.shape == (0, 99)


def test_the_native_backend_says_that_it_gives_no_vectors(
    runtime: Runtime, save_checkpoint: Callable[..., tuple]
) -> None:
    folder, _ = save_checkpoint(CONFIGS["llama"])
    backend = recorded(folder, runtime)
    batch = build_batch([(FakeSequence([5], [3]), 1)], 4)
    with pytest.raises(NotImplementedError, match="no vectors"):
        backend.run(batch, backend.new_cache(16, 4), OutputKind.VECTORS)


@pytest.mark.parametrize("count", [2, 40, 140])
@pytest.mark.parametrize("name", ["llama", "gemma2", "starcoder2"])
def test_a_chunk_without_logits_leaves_the_same_cache_and_the_same_next_logits(
    name: str, count: int, runtime: Runtime, save_checkpoint: Callable[..., tuple]
) -> None:
    folder, _ = save_checkpoint(CONFIGS[name])
    model = recorded(folder, runtime)
    prompt = [7 * i % 99 for i in range(count + 1)]
    caches, logits = [], []
    for is_silent in (False, True):
        runner = Runner(model)
        sequence = runner.add(prompt)
        (runner.step_without_logits if is_silent else runner.step)((sequence, count))
        caches += [torch.stack((*runner.cache.keys, *runner.cache.values))]
        logits += [runner.step_for_last((sequence, 1)).clone()]
    assert torch.equal(*caches)
    assert torch.equal(*logits)
