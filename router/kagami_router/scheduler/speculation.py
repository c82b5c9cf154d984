"""Drafted tokens: somebody guesses what follows, and one step verifies several tokens at once.

Speculative decoding, arXiv:2211.17192. Who guesses is not known here; nothing in the router does
yet. A draft can only continue ids that are known, so a sequence with a step in flight gets none.
"""

from collections.abc import Sequence as Seq
from typing import Protocol

from kagami_router.scheduler.pool import KVPool
from kagami_router.scheduler.sequence import Sequence, Status
from kagami_router.scheduler.step_builder import StepBuilder


class Drafter(Protocol):
    """Guesses how a sequence goes on."""

    def draft(self, sequence: Sequence, max_tokens: int) -> Seq[int]:
        """At most `max_tokens` ids that may follow `sequence.log.ids`; none = no guess."""
        ...


def put_drafts(
    drafter: Drafter, builder: StepBuilder, sequences: list[Sequence], pool: KVPool
) -> list[Sequence]:
    """Have drafts verified; returns the sequences that neither got one nor wait for one."""
    others = []
    num_spare = builder.eligible.num_spare_blocks(sequences)
    for sequence in sequences:
        if sequence.num_drafted:
            continue
        draft = _draft_for(drafter, builder, sequence)
        num_tokens = sequence.num_scheduled + 1 + len(draft)
        num_new = max(0, pool.blocks_for(num_tokens) - len(sequence.blocks))
        # Nobody is preempted for a guess.
        if not draft or pool.num_available < num_new + num_spare:
            others.append(sequence)
            continue
        blocks = pool.allocate(num_new)
        sequence.blocks += blocks
        builder.put_draft(sequence, draft, blocks)
    return others


def _draft_for(drafter: Drafter, builder: StepBuilder, sequence: Sequence) -> Seq[int]:
    position = sequence.num_scheduled
    most = min(sequence.max_kv_tokens - position, builder.tokens) - 1
    if (
        most < 1
        or builder.room <= 0
        or position < sequence.prefill_end
        or sequence.status is not Status.RUNNING
        or sequence.last_step > builder.num_updated
    ):
        return ()
    return drafter.draft(sequence, most)
