"""The reference backend: what a forward pass gives, and how a device is left after an error."""

from collections.abc import Callable

import pytest
import torch
from tests.fakes.batches import FakeSequence, build_batch
from tests.fakes.tiny_model import tiny_backend
from tests.shard.backends.torch import test_transformers
from tests.shard.models import test_decoder
from tests.shard.models.parity import prompts
from torch import Tensor

from kagami_proto.values import DEVICE_POLICIES
from kagami_shard.backends.torch.load import load_torch
from kagami_shard.backends.torch.runner import TorchBackend
from kagami_shard.forward.kv_cache import KVCache
from kagami_shard.forward.output import Output, OutputKind

CPU = torch.device("cpu")
TOKENS = prompts(99)[0]
ROWS = [2, 22]
CONFIGS = test_decoder.CONFIGS | test_transformers.CONFIGS


@torch.inference_mode()
def output_of(backend: TorchBackend, wanted: OutputKind) -> Output:
    """After two of the tokens, all of which are computed in one step."""
    sequence = FakeSequence(TOKENS, [3, 1, 5, 2, 6, 4])
    batch = build_batch([(sequence, len(TOKENS))], 4, rows=ROWS)
    return backend.run(batch, backend.new_cache(7, 4), wanted)


def given(value: Tensor | None) -> Tensor:
    assert value is not None
    return value


@pytest.mark.parametrize("name", CONFIGS)
def test_vectors_are_the_hidden_states_behind_the_last_norm(
    name: str, save_checkpoint: Callable[..., tuple]
) -> None:
    folder, reference = save_checkpoint(CONFIGS[name])
    with torch.inference_mode():
        theirs = reference.base_model(torch.tensor([TOKENS]), use_cache=False).last_hidden_state

    output = output_of(load_torch(folder, dtype=torch.float32, device=CPU), OutputKind.VECTORS)

    assert output.logits is None, "the head was not asked for"
    assert torch.allclose(given(output.vectors), theirs[0, ROWS], atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_vectors_come_beside_the_same_logits(
    name: str, save_checkpoint: Callable[..., tuple]
) -> None:
    backend = load_torch(save_checkpoint(CONFIGS[name])[0], dtype=torch.float32, device=CPU)

    alone = output_of(backend, OutputKind.LOGITS)
    both = output_of(backend, OutputKind.LOGITS | OutputKind.VECTORS)

    assert alone.vectors is None
    assert torch.equal(given(both.logits), given(alone.logits))
    assert given(both.vectors).shape == (len(ROWS), 48)


def test_the_device_says_how_it_wants_to_be_used() -> None:
    assert tiny_backend().policy is DEVICE_POLICIES["cpu"]
    assert tiny_backend(device=torch.device("cuda")).policy is DEVICE_POLICIES["cuda"]


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError(), ValueError("a bug")]
)
def test_the_next_step_can_succeed_after_most_errors(error: Exception) -> None:
    tiny_backend().recover(error)


def test_a_failed_kernel_is_raised_again() -> None:
    """CUDA gives the same error to every later call of the process."""
    error = torch.AcceleratorError("CUDA error: an illegal memory access was encountered", 700)

    with pytest.raises(torch.AcceleratorError) as raised:
        tiny_backend().recover(error)
    assert raised.value is error


def test_memory_that_torch_holds_is_given_back_after_too_little_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    emptied: list[None] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(None))
    backend = tiny_backend(device=torch.device("cuda"))

    backend.recover(ValueError("a bug"))
    assert not emptied
    backend.recover(torch.OutOfMemoryError("CUDA out of memory"))
    assert len(emptied) == 1


def test_a_successor_takes_over_with_the_cache() -> None:
    first, second = tiny_backend(), tiny_backend()
    asked: list[tuple[TorchBackend, KVCache | None]] = []

    def successor(backend: TorchBackend, cache: KVCache | None) -> TorchBackend:
        asked.append((backend, cache))
        return second

    backend = TorchBackend(
        first.model, lambda *_: Output(), dtype=torch.float32, device=CPU, successor=successor
    )
    cache = backend.new_cache(2, 4)

    assert backend.upgrade(cache) is second
    assert asked == [(backend, cache)]
    assert second.upgrade(cache) is second, "nobody follows"
