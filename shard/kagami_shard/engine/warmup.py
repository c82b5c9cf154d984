"""The warm-up: run the largest step, measure what memory is left, allocate the KV cache."""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch

from kagami_proto.values import SamplingParams
from kagami_shard.backends.base import Backend
from kagami_shard.engine.generation import GenerationState
from kagami_shard.engine.items import Item
from kagami_shard.engine.step import NewSequence
from kagami_shard.forward.kv_cache import KVCache, block_bytes, blocks_for

logger = logging.getLogger(__name__)

Run = Callable[[list[Item], KVCache], object]
"""One step: the forward pass of the items, and a token drawn for each"""


@dataclass(frozen=True, slots=True)
class WarmupLimits:
    """The largest step and the largest sequence that the router will send."""

    max_step_tokens: int
    max_batch_size: int
    max_total_tokens: int
    """0: the model's max_positions"""
    max_pool_tokens: int
    """0: as memory allows"""


def measured_cache(backend: Backend, limits: WarmupLimits, *, block_size: int, run: Run) -> KVCache:
    """The cache that fits beside the largest step, which `run` runs first.

    The step is as large as the limits allow, or as the backend's policy says. Raises
    torch.OutOfMemoryError.
    """
    policy = backend.policy
    num_tokens = min(limits.max_step_tokens, policy.warmup_tokens or limits.max_step_tokens)
    num_rows = min(limits.max_batch_size, policy.warmup_rows or limits.max_batch_size)
    longest = limits.max_total_tokens or backend.model.max_positions or num_tokens
    _run_steps(backend, num_tokens, min(longest, num_tokens), num_rows, block_size, run)
    num_blocks = _size_pool(backend, limits, longest, block_size)
    return backend.new_cache(num_blocks, block_size)


def _run_steps(
    backend: Backend, num_tokens: int, max_length: int, num_rows: int, block_size: int, run: Run
) -> None:
    """`num_tokens` tokens in prompts of at most `max_length`, then `num_rows` decodes."""
    lengths = [max_length] * (num_tokens // max_length)
    if num_tokens % max_length:
        lengths.append(num_tokens % max_length)
    num_blocks = 1 + sum(blocks_for(length, block_size) for length in lengths)
    cache = backend.new_cache(num_blocks, block_size)
    free = iter(range(1, num_blocks))
    items = []
    for number, length in enumerate(lengths):
        state = GenerationState(_sequence(number, length))
        state.blocks = [next(free) for _ in range(blocks_for(length, block_size))]
        items.append(Item(state, 0, length))
    run(items, cache)
    decodes = []
    for number in range(num_rows):
        state = GenerationState(_sequence(number, max_length))
        state.blocks = items[0].state.blocks
        decodes.append(Item(state, max_length - 1, 1))
    run(decodes, cache)


def _size_pool(backend: Backend, limits: WarmupLimits, longest: int, block_size: int) -> int:
    """Blocks that fit, scratch block included."""
    size = block_bytes(backend.model.layers, block_size, backend.dtype)
    free = backend.pool_bytes()
    num_blocks = free // size
    wanted = limits.max_pool_tokens
    if not wanted and backend.policy.pool_tokens:
        wanted = max(backend.policy.pool_tokens, longest)
    if wanted:
        num_blocks = min(num_blocks, 1 + blocks_for(wanted, block_size))
    if num_blocks < 2:
        raise torch.OutOfMemoryError(
            f"no room for the KV cache: one block takes {size} bytes, {free} are free"
        )
    logger.info(
        "KV-cache blocks: %d, size: %d",
        num_blocks,
        block_size,
        extra={"bytes": num_blocks * size},
    )
    return num_blocks


def _sequence(number: int, length: int) -> NewSequence:
    """With every filter on, so that the warm-up samples in the most costly way."""
    return NewSequence(
        id=number,
        token_ids=[1] * length,
        num_prompt_tokens=length,
        sampling=SamplingParams(do_sample=True, top_k=10, top_p=0.9, typical_p=0.9),
    )
