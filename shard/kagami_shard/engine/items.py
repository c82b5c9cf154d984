"""The work of a step, item by item, and the tensors made from it."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from kagami_proto.values import Wanted
from kagami_shard.engine.generation import GenerationState, Pending
from kagami_shard.forward.batch import ForwardBatch, Queries
from kagami_shard.forward.kv_cache import blocks_for
from kagami_shard.machine.device import to_device


class Item(NamedTuple):
    """One sequence's part of a step."""

    state: GenerationState
    position: int
    num_tokens: int
    wanted: Wanted = Wanted.ONE_TOKEN

    @property
    def end(self) -> int:
        return self.position + self.num_tokens


def prompt_rows(item: Item) -> int:
    """The number of the item's tokens after which a prompt logprob is wanted."""
    if not item.state.prompt_logprobs:
        return 0
    return max(0, min(item.end, item.state.num_prompt_tokens - 1) - item.position)


def build_batch(
    items: Sequence[Item],
    samples: Sequence[Item],
    prompts: Sequence[Item],
    *,
    block_size: int,
    device: torch.device,
) -> ForwardBatch:
    """The tensors of a step.

    The selected rows are first one of each of `samples`, then `prompt_rows` of each of `prompts`.
    """

    def tensor(values: Sequence[object]) -> Tensor:
        return to_device(values, dtype=torch.int64, device=device)

    input_ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    last_rows: dict[int, int] = {}
    pending_rows: list[int] = []
    pending: list[Pending] = []
    for state, position, count, _ in items:
        end = position + count
        input_ids += state.ids[position:end]
        if end > len(state.ids):
            assert state.pending is not None
            pending_rows.append(len(input_ids))
            pending.append(state.pending)
            input_ids.append(0)
        positions += range(position, end)
        blocks = state.blocks
        slots += [
            blocks[p // block_size] * block_size + p % block_size for p in range(position, end)
        ]
        last_rows[state.id] = len(input_ids) - 1
    rows = [last_rows[item.state.id] for item in samples]
    for item in prompts:
        first = last_rows[item.state.id] - item.num_tokens + 1
        rows += range(first, first + prompt_rows(item))
    ids = tensor(input_ids)
    if pending:
        # All pending ids come from one step: the last one.
        source = pending[0].token_ids
        ids[tensor(pending_rows)] = source[tensor([p.row for p in pending])]
    width = max(blocks_for(item.end, block_size) for item in items)
    tables = [(blocks := item.state.blocks[:width]) + [0] * (width - len(blocks)) for item in items]
    queries = Queries(
        block_tables=tensor(tables),
        query_lens=tuple(item.num_tokens for item in items),
        kv_lens=tuple(item.end for item in items),
        num_decodes=sum(item.num_tokens == 1 for item in items),
    )
    return ForwardBatch(
        input_ids=ids,
        positions=tensor(positions),
        slots=tensor(slots),
        queries=queries,
        selected_rows=tensor(rows),
        selected=queries.at(rows),
    )


def samples_token(item: Item) -> bool:
    """Whether a token is chosen behind this item: it wants one, and no known id follows."""
    return item.wanted is Wanted.ONE_TOKEN and item.end == item.state.num_known
