"""Counted randomness: the number drawn at a position is a function of (seed, position).

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). There is no
state to carry, so a sequence draws the same numbers alone, in a batch, on any rank, after a
preemption and after a restart.
"""

_MASK = 0xFFFFFFFF
# Multipliers and key increments from the paper, section 4.
_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85


def philox(key: int, counter: int) -> tuple[int, int, int, int]:
    """Four 32-bit words of the 64-bit `key` at the 128-bit `counter`."""
    c0, c1, c2, c3 = (counter >> shift & _MASK for shift in (0, 32, 64, 96))
    k0, k1 = key & _MASK, key >> 32 & _MASK
    for _ in range(10):
        product0, product1 = _M0 * c0, _M1 * c2
        c0, c1, c2, c3 = (
            (product1 >> 32) ^ c1 ^ k0,
            product1 & _MASK,
            (product0 >> 32) ^ c3 ^ k1,
            product0 & _MASK,
        )
        k0, k1 = (k0 + _W0) & _MASK, (k1 + _W1) & _MASK
    return c0, c1, c2, c3


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) with 53 random bits."""
    high, low, _, _ = philox(seed, position)
    return ((high << 32 | low) >> 11) * 2.0**-53
