import ctypes
from pathlib import Path

import pytest

from kagami_shard.backends.native import library as mirror
from kagami_shard.backends.native.library import (
    CBuffer,
    COp,
    LayoutDiffers,
    Library,
    compare_layout,
    layout,
)
from kagami_shard.backends.native.packing import Packer
from kagami_shard.backends.native.runtime import Runtime
from kagami_shard.backends.native.tape import Tape


def test_the_library_and_its_mirror_agree_about_every_struct_and_number(library: Library) -> None:
    assert library.kg_layout().decode() == layout()


def test_a_struct_with_another_field_is_refused() -> None:
    theirs = layout().replace("kg_rope 24 0 4 8 16", "kg_rope 32 0 8 16 24")
    with pytest.raises(LayoutDiffers, match="kg_rope 32 0 8 16 24 in place of kg_rope 24 0 4 8 16"):
        compare_layout(theirs)


def test_a_struct_that_only_one_side_knows_is_refused() -> None:
    with pytest.raises(LayoutDiffers, match="kg_new 8 0 in place of nothing"):
        compare_layout(layout() + "kg_new 8 0\n")


def test_a_library_of_another_layout_does_not_load(
    library: Library, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror, "LOGITS", -2)
    with pytest.raises(OSError, match="logits -1 in place of logits -2"):
        Library(Path(library._name))


def test_an_op_that_the_library_does_not_know_makes_no_tape(runtime: Runtime) -> None:
    ops, buffers = (COp * 1)(COp(code=99)), (CBuffer * 1)(CBuffer(16, 4, 0))
    with pytest.raises(ValueError, match="op 0, of code 99: there is no such op"):
        Tape(
            runtime,
            ops,
            buffers,
            vocab_size=1,
            packer=Packer(runtime.library),
            tensors=(),
            alive=ctypes,
        )
