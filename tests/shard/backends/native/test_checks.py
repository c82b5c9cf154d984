"""The library compares sizes with memory: what does not fit is refused, and nothing is read.

The same mutants run under AddressSanitizer in `test_sanitizers.py`.
"""

import pytest
from tests.shard.backends.native.mutated_sizes import (
    PACKING,
    PROGRAMS,
    mutated_packing,
    mutated_tapes,
    outside_the_vocabulary,
)

from kagami_shard.backends.native.library import Library
from kagami_shard.backends.native.runtime import Runtime


@pytest.mark.parametrize("kind", PACKING)
def test_a_weight_with_less_memory_than_its_sizes_say_is_refused(
    kind: str, library: Library
) -> None:
    outcomes = mutated_packing(library, kind)
    assert outcomes.pop("sound") == 0
    assert {name: outcome for name, outcome in outcomes.items() if outcome != 1} == {}


@pytest.mark.parametrize("kind", PROGRAMS)
def test_a_tape_that_would_leave_its_buffers_or_memory_is_refused(
    kind: str, library: Library
) -> None:
    outcomes = mutated_tapes(Runtime(library, 1, use_amx=False), kind)
    assert outcomes.pop("sound") == ""
    assert [name for name, reason in outcomes.items() if not reason] == []
    assert len(outcomes) > 40


@pytest.mark.parametrize("token", [-1, 64, 2**31, 2**62])
def test_a_token_without_an_embedding_is_refused(token: int, library: Library) -> None:
    with pytest.raises(ValueError, match="a token id is outside of the vocabulary"):
        outside_the_vocabulary(Runtime(library, 1, use_amx=False), token)
