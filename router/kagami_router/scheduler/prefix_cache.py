"""Which full blocks of computed KV can be used again: a tree, one block an edge.

The path from the root to a node spells the prefix whose KV the node's block ends; so two nodes
are the same prefix only if everything before them is the same, too. A prefix is more than ids:
another adapter or another image under the same ids gives other KV. Only confirmed KV comes in:
`insert` is called when a step's result was read, never when it was scheduled.

A sequence's path is that part of the tree whose blocks are the first of its own table. So a node
is held by at least as many tables as each of its children, and every node that nobody holds can
be evicted in the end, leaves first: exactly the blocks that the allocator calls cached.
"""

import heapq
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from kagami_router.request.prompt import Media
from kagami_router.scheduler.blocks import BlockAllocator

_make = tuple.__new__


class BlockKey(NamedTuple):
    """What one block of KV depends on, beside all blocks before it."""

    ids: tuple[int, ...]
    adapter: str | None
    media: tuple[tuple[bytes, int], ...]
    """Content hash and first position of those that reach into the block."""


class PrefixKey(NamedTuple):
    """What the KV of a sequence is a function of: equal keys, equal KV."""

    ids: Sequence[int]
    """Of the token log: they grow with it."""
    adapter: str | None = None
    media: tuple[Media, ...] = ()

    def block(self, index: int, size: int) -> BlockKey:
        """The key of the block with that index, of `size` tokens."""
        start = index * size
        ids = tuple(self.ids[start : start + size])
        media: tuple[tuple[bytes, int], ...] = ()
        if self.media:
            media = tuple(
                (each.content_hash, each.start)
                for each in self.media
                if each.start < start + size and start < each.end
            )
        # As `BlockKey(...)`, which is a Python function and takes three times as long.
        return _make(BlockKey, (ids, self.adapter, media))


class Node:
    """One full block behind its parent's."""

    __slots__ = ("block", "children", "key", "last_used", "parent")

    def __init__(self, parent: "Node | None", key: BlockKey, block: int) -> None:
        self.parent = parent
        self.key = key
        self.block = block
        self.children: dict[BlockKey, Node] = {}
        self.last_used = 0


# When it was noted, a tie-breaker, the leaf. Out of date if the leaf was used since.
_IdleLeaf = tuple[int, int, Node]


class PrefixCache:
    """A radix tree over full blocks; least recently used leaves that nobody holds go first."""

    def __init__(self, allocator: BlockAllocator, block_size: int) -> None:
        self._allocator = allocator
        self._block_size = block_size
        self.root = Node(None, BlockKey((), None, ()), 0)
        self._clock = 0
        self._idle_leaves: list[_IdleLeaf] = []
        self._num_noted = 0

    def match(self, prefix: PrefixKey, max_blocks: int) -> list[Node]:
        """The longest path of at most `max_blocks` nodes that spells the beginning of `prefix`."""
        path: list[Node] = []
        children = self.root.children
        while len(path) < max_blocks:
            node = children.get(prefix.block(len(path), self._block_size))
            if node is None:
                break
            path.append(node)
            children = node.children
        return path

    def acquire(self, path: list[Node]) -> list[int]:
        """The blocks of a matched path, held by one more table."""
        blocks = [node.block for node in path]
        for block in blocks:
            self._allocator.share(block)
        return blocks

    def insert(self, path: list[Node], prefix: PrefixKey, blocks: list[int], end: int) -> None:
        """Lengthen a sequence's `path` by its full blocks up to the `end`-th.

        Where the tree has the same tokens in another block (this sequence could not use it: it
        had to compute one token at least, or prompt log-probabilities), the other is given up if
        nobody holds it; else the path ends here for now.
        """
        for index in range(len(path), end):
            parent = path[-1] if path else self.root
            key = prefix.block(index, self._block_size)
            node = parent.children.get(key)
            if node is None:
                node = Node(parent, key, blocks[index])
                parent.children[key] = node
            elif self._allocator.is_held(node.block):
                return
            else:
                self._allocator.evict(node.block)
                node.block = blocks[index]
            self._allocator.put_in_cache(node.block)
            path.append(node)

    def release(self, path: list[Node]) -> None:
        """A sequence lets go of its path, just after its table's blocks were released."""
        self._clock += 1
        for node in path:
            node.last_used = self._clock
        if path:
            self._note_if_idle_leaf(path[-1])

    def evict(self, count: int) -> None:
        """Free `count` blocks that nobody holds; the caller knows that there are as many."""
        while count > 0:
            entry = heapq.heappop(self._idle_leaves)
            leaf, parent = entry[2], entry[2].parent
            if parent is None or not self._is_current(entry):
                continue
            self._remove(leaf, parent)
            count -= 1
            self._note_if_idle_leaf(parent)

    def forget(self, path: list[Node]) -> None:
        """Evict a released path as far as nobody else holds or continues it."""
        for node in reversed(path):
            if node.parent is None or node.children or self._allocator.is_held(node.block):
                break
            self._remove(node, node.parent)
        else:
            return
        self._note_if_idle_leaf(node)

    def _remove(self, leaf: Node, parent: Node) -> None:
        del parent.children[leaf.key]
        leaf.parent = None
        self._allocator.evict(leaf.block)

    def _note_if_idle_leaf(self, node: Node) -> None:
        if node.parent is None or node.children or self._allocator.is_held(node.block):
            return
        self._num_noted += 1
        heapq.heappush(self._idle_leaves, (node.last_used, self._num_noted, node))
        if len(self._idle_leaves) > 2 * self._allocator.num_cached + 64:
            self._idle_leaves = [each for each in self._idle_leaves if self._is_current(each)]
            heapq.heapify(self._idle_leaves)

    def _is_current(self, entry: _IdleLeaf) -> bool:
        """Whether the leaf can still be evicted and was not used since it was noted."""
        last_used, _, leaf = entry
        return (
            leaf.last_used == last_used
            and leaf.parent is not None
            and not leaf.children
            and not self._allocator.is_held(leaf.block)
        )

    def nodes(self) -> Iterator[Node]:
        """Every node but the root."""
        stack = list(self.root.children.values())
        while stack:
            node = stack.pop()
            yield node
            stack.extend(node.children.values())

    def check_integrity(self, paths_and_tables: list[tuple[list[Node], list[int]]]) -> None:
        """Paths are paths of this tree, nobody else holds its blocks, idle leaves can be found."""
        holders: dict[Node, int] = {}
        for path, table in paths_and_tables:
            assert [node.block for node in path] == table[: len(path)], "path and table differ"
            for depth, node in enumerate(path):
                assert node.parent is (path[depth - 1] if depth else self.root), "a broken path"
                holders[node] = holders.get(node, 0) + 1
        leaves = {entry[2] for entry in self._idle_leaves if self._is_current(entry)}
        num_idle = 0
        for node in self.nodes():
            assert len(node.key.ids) == self._block_size
            assert node.parent is not None
            is_held = node in holders
            assert self._allocator.is_held(node.block) == is_held, "held outside of any path"
            assert not is_held or node.parent is self.root or node.parent in holders
            assert is_held or node.children or node in leaves, "an idle leaf is lost"
            num_idle += not is_held
        assert num_idle == self._allocator.num_cached
