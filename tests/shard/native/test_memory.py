from kagami_shard.bandwidth import weight_bytes
from kagami_shard.native.library import Library
from kagami_shard.native.memory import Arena


def test_what_an_arena_handed_out_counts_as_weights(library: Library) -> None:
    arena = Arena(library)
    arena.take(5000)
    assert weight_bytes([arena, arena]) == 8192
