from kagami_shard.backends.native.library import Library
from kagami_shard.backends.native.memory import Arena


def test_an_arena_counts_the_pages_that_it_handed_out(library: Library) -> None:
    arena = Arena(library)
    arena.take(5000)
    assert arena.num_bytes == 8192
