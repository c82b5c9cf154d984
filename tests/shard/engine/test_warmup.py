"""How large the warm-up's steps and the cache are, for devices that want different things."""

from dataclasses import replace

import pytest
import torch
from tests.fakes.tiny_model import CPU, TinyModel

from kagami_proto.values import DEVICE_POLICIES, DevicePolicy
from kagami_shard.backends.torch.runner import TorchBackend
from kagami_shard.engine.items import Item
from kagami_shard.engine.warmup import WarmupLimits, measured_cache
from kagami_shard.forward.kv_cache import KVCache, block_bytes

BLOCK = 4
ROOM = 10_000
"""Blocks that the memory has room for"""


class Device(TorchBackend):
    """A backend with a policy and a memory of its own."""

    def __init__(self, policy: DevicePolicy, num_blocks: int = ROOM) -> None:
        model = TinyModel()
        super().__init__(model, model.forward, dtype=torch.float32, device=CPU)
        self._policy = policy
        self._num_bytes = num_blocks * block_bytes(model.layers, BLOCK, torch.float32)

    @property
    def policy(self) -> DevicePolicy:
        return self._policy

    def pool_bytes(self) -> int:
        return self._num_bytes


def warm(backend: Device, limits: WarmupLimits) -> tuple[KVCache, list[list[int]]]:
    """The cache, and of each step how many tokens each of its items had."""
    steps: list[list[int]] = []

    def run(items: list[Item], cache: KVCache) -> None:
        assert all(item.end <= len(item.state.blocks) * BLOCK for item in items)
        assert max(max(item.state.blocks) for item in items) < cache.num_blocks
        steps.append([item.num_tokens for item in items])

    return measured_cache(backend, limits, block_size=BLOCK, run=run), steps


def test_a_gpu_runs_the_largest_steps_that_the_limits_allow() -> None:
    _, steps = warm(Device(DEVICE_POLICIES["cuda"]), WarmupLimits(70, 5, 30, 0))
    assert steps == [[30, 30, 10], [1] * 5]


def test_a_cpu_runs_a_few_tokens() -> None:
    _, steps = warm(Device(DEVICE_POLICIES["cpu"]), WarmupLimits(4096, 64, 2048, 0))
    assert steps == [[32], [1, 1]]


@pytest.mark.parametrize(
    ("policy", "limits", "num_blocks"),
    [
        (DEVICE_POLICIES["cuda"], WarmupLimits(8, 1, 100, 0), ROOM),
        (DEVICE_POLICIES["cuda"], WarmupLimits(8, 1, 100, 400), 101),
        (DEVICE_POLICIES["cpu"], WarmupLimits(8, 1, 100, 0), 1 + 24_576 // BLOCK),
        (DEVICE_POLICIES["cpu"], WarmupLimits(8, 1, 30_000, 0), 1 + 30_000 // BLOCK),
        (DEVICE_POLICIES["cpu"], WarmupLimits(8, 1, 100, 30_000), 1 + 30_000 // BLOCK),
    ],
)
def test_the_cache_is_as_large_as_asked_for_or_as_the_policy_says(
    policy: DevicePolicy, limits: WarmupLimits, num_blocks: int
) -> None:
    cache, _ = warm(Device(policy), limits)
    assert cache.num_blocks == num_blocks


def test_the_cache_is_no_larger_than_the_memory() -> None:
    cache, _ = warm(Device(DEVICE_POLICIES["cpu"], 77), WarmupLimits(8, 1, 100, 0))
    assert cache.num_blocks == 77


def test_a_memory_without_room_for_a_block_is_told() -> None:
    with pytest.raises(torch.OutOfMemoryError, match="no room for the KV cache"):
        warm(Device(DEVICE_POLICIES["cuda"], 1), WarmupLimits(8, 1, 100, 0))


def test_a_policy_bounds_the_prefill_and_the_decodes_apart() -> None:
    policy = replace(DEVICE_POLICIES["cuda"], warmup_tokens=6, warmup_rows=0)
    _, steps = warm(Device(policy), WarmupLimits(70, 5, 30, 0))
    assert steps == [[6], [1] * 5]
