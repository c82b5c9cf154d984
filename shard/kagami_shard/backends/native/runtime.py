"""The library's threads, and what they compute outside of a tape."""

import weakref

import torch
from torch import Tensor

from kagami_shard.backends.native.library import Library, pointer
from kagami_shard.forward.kv_cache import KVCache

# Looks at a barrier before a thread sleeps (notes/0004).
SPINS = 2_000


class Runtime:
    """A pool of `num_threads` threads, including the caller's; one thread calls at a time.

    It is the `Scorer` of the logits that the library computes.
    """

    def __init__(
        self, library: Library, num_threads: int, *, spins: int = SPINS, use_amx: bool | None = None
    ) -> None:
        self.library = library
        self.num_threads = num_threads
        self.use_amx = bool(library.kg_has_amx()) if use_amx is None else use_amx
        self.pool = library.kg_pool_new(num_threads, spins, self.use_amx)
        weakref.finalize(self, library.kg_pool_delete, self.pool)

    def arrange(self, cache: KVCache) -> None:
        """Bring what torch has written into `cache` into the order that the library reads."""
        for keys, values in zip(cache.keys, cache.values, strict=True):
            self.library.kg_arrange(pointer(keys), pointer(values), *keys.shape)

    def choose_tokens(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """As `sampling.logprobs.Scorer` says."""
        num_rows, vocab_size = logits.shape
        ids = torch.empty(num_rows, dtype=torch.int64)
        logprobs = torch.empty(num_rows)
        self.library.kg_choose_tokens(
            self.pool, pointer(logits), num_rows, vocab_size, pointer(ids), pointer(logprobs)
        )
        return ids, logprobs

    def logprobs(self, logits: Tensor, ids: Tensor) -> Tensor:
        """As `sampling.logprobs.Scorer` says."""
        num_rows, vocab_size = logits.shape
        ids = ids.contiguous()
        logprobs = torch.empty(ids.shape)
        self.library.kg_logprobs(
            self.pool,
            pointer(logits),
            num_rows,
            vocab_size,
            pointer(ids),
            ids.shape[1],
            pointer(logprobs),
        )
        return logprobs
