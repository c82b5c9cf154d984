"""The KV pool as the router sees it: which block is free, held or cached.

```
            allocate                       release (last holder)
   free ───────────────► held ─────────────────────────────────► free
                          │ ▲ share                                ▲
             put_in_cache ▼ │         release (last holder)        │ evict
                     held, in cache ────────────────────────► cached
                                    ◄────────────────────────
                                              share
```
Knows block ids only: neither tokens nor sequences.
"""

from collections.abc import Iterable


class BlockAllocator:
    """Free list, holder counts, and which blocks are in the prefix cache.

    Block 0 is never given away: surplus rows of a captured graph write there.
    """

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 2:
            raise ValueError(f"a pool needs at least 2 blocks, not {num_blocks}")
        self._free = list(range(num_blocks - 1, 0, -1))
        self._holders = [0] * num_blocks
        self._is_in_cache = [False] * num_blocks
        self.num_cached = 0
        self.num_fresh = num_blocks - 1
        """Free blocks that were never given away; what was is given again first"""

    @property
    def num_total(self) -> int:
        """Blocks that may be given to sequences."""
        return len(self._holders) - 1

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_held(self) -> int:
        """Blocks in at least one block table, each counted once."""
        return self.num_total - self.num_free - self.num_cached

    def is_held(self, block: int) -> bool:
        return self._holders[block] > 0

    def allocate(self, count: int) -> list[int]:
        """Take `count` free blocks; the caller has made sure that there are as many."""
        assert 0 <= count <= len(self._free), f"{count} blocks asked, {len(self._free)} free"
        blocks = [self._free.pop() for _ in range(count)]
        self.num_fresh = min(self.num_fresh, len(self._free))
        for block in blocks:
            self._holders[block] = 1
        return blocks

    def share(self, block: int) -> None:
        """One more table holds a block that is held or cached."""
        if self._holders[block] == 0:
            assert self._is_in_cache[block], f"block {block} is free"
            self.num_cached -= 1
        self._holders[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """A table lets go of its blocks; what is neither held nor in the cache is free again."""
        for block in blocks:
            assert self._holders[block] > 0, f"block {block} is not held"
            self._holders[block] -= 1
            if self._holders[block] == 0:
                if self._is_in_cache[block]:
                    self.num_cached += 1
                else:
                    self._free.append(block)

    def put_in_cache(self, block: int) -> None:
        """A held block will stay in the prefix cache when its holders let go."""
        assert self._holders[block] > 0, f"block {block} is not held"
        assert not self._is_in_cache[block], f"block {block} is in the cache already"
        self._is_in_cache[block] = True

    def evict(self, block: int) -> None:
        """The prefix cache gives up a block that nobody holds."""
        assert self._is_in_cache[block], f"block {block} is not in the cache"
        assert self._holders[block] == 0, f"block {block} is held"
        self._is_in_cache[block] = False
        self.num_cached -= 1
        self._free.append(block)

    def check_integrity(self, tables: Iterable[list[int]], in_cache: Iterable[int]) -> None:
        """Every block is free, held or cached, as the tables and the cache's blocks say."""
        holders = [0] * len(self._holders)
        for table in tables:
            assert len(set(table)) == len(table), "a table names a block twice"
            for block in table:
                holders[block] += 1
        cache_blocks = list(in_cache)
        is_in_cache = [False] * len(self._holders)
        for block in cache_blocks:
            assert not is_in_cache[block], f"block {block} is in the cache twice"
            is_in_cache[block] = True
        free = set(self._free)
        assert len(free) == len(self._free), "a block is free twice"
        assert holders[0] == 0, "the reserved block is held"
        assert not is_in_cache[0], "the reserved block is in the cache"
        assert 0 not in free, "the reserved block is free"
        assert holders == self._holders, "holder counts differ from the tables"
        assert is_in_cache == self._is_in_cache, "what is marked as cached differs from the cache"
        for block in range(1, len(self._holders)):
            is_idle = holders[block] == 0 and not is_in_cache[block]
            assert (block in free) == is_idle, f"block {block} leaked or given twice"
        cached = sum(marked and not held for marked, held in zip(is_in_cache, holders, strict=True))
        assert cached == self.num_cached
        held = sum(count > 0 for count in holders)
        assert self.num_free + held + cached == self.num_total
