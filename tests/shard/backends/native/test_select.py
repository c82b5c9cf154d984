import logging
from pathlib import Path

import pytest
import torch
from tests.fakes.batches import Runner
from tests.fakes.native import needs_library
from tests.fakes.tiny_model import TinyModel
from tests.shard.models.test_decoder import CONFIGS
from transformers import AutoModelForCausalLM

from kagami_shard.backends.native import build, select
from kagami_shard.backends.native.build import find_compiler, library_path
from kagami_shard.backends.native.model import RecordedDecoder
from kagami_shard.backends.native.select import Native
from kagami_shard.backends.torch.load import load_torch
from kagami_shard.backends.torch.runner import TorchBackend
from kagami_shard.engine.engine import Engine

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    needs_library()
    AutoModelForCausalLM.from_config(CONFIGS["llama"]).save_pretrained(tmp_path)
    return tmp_path


def load(folder: Path, native: Native) -> TorchBackend:
    """A decoder in torch, which `native` may take over."""
    return load_torch(folder, dtype=torch.bfloat16, device=CPU, successor=native.take_over)


def test_a_built_library_serves_at_once(folder: Path, native_cache: Path, library: object) -> None:
    native = Native(native_cache, 2)
    backend, build_to_start = native.choose(load(folder, native))
    assert build_to_start is None
    assert isinstance(backend.model, RecordedDecoder)
    assert (backend.name, backend.upgrade(None)) == ("native", backend)


def test_without_the_library_torch_serves_until_it_is_built(
    folder: Path, native_cache: Path, monkeypatch: pytest.MonkeyPatch, library: object
) -> None:
    native = Native(folder, 2)
    backend, late_build = native.choose(load(folder, native))
    assert late_build is not None
    engine = Engine(backend, block_size=4)
    assert engine.backend.name == "sdpa"
    built = select.build(native_cache)
    monkeypatch.setattr(select, "build", lambda cache: built)
    late_build.build(engine.upgrade)
    assert engine.backend.name == "native"


@pytest.mark.parametrize(
    ("dtype", "device", "reason"),
    [
        (torch.float32, CPU, "the dtype is float32, not bfloat16"),
        (torch.bfloat16, torch.device("cuda"), "the device is cuda"),
    ],
)
def test_the_log_says_why_torch_serves(
    dtype: torch.dtype,
    device: torch.device,
    reason: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = TinyModel()
    backend = TorchBackend(model, model.forward, dtype=dtype, device=device)
    with caplog.at_level(logging.INFO):
        assert Native(tmp_path, 1).choose(backend) == (backend, None)
    assert f"CPU kernels: torch, because {reason}" in caplog.text


def test_a_library_that_disagrees_is_not_used(
    folder: Path,
    native_cache: Path,
    library: object,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(select, "agrees_with_torch", lambda runtime: False)
    with caplog.at_level(logging.INFO):
        native = Native(native_cache, 2)
        backend, _ = native.choose(load(folder, native))
    assert backend.name == "sdpa"
    assert "the library disagrees with torch" in caplog.text


def test_a_damaged_library_is_not_used_and_makes_room_for_another(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    compiler = find_compiler()
    assert compiler is not None
    damaged = library_path(folder, compiler)
    damaged.write_bytes(b"")
    with caplog.at_level(logging.INFO):
        native = Native(folder, 2)
        backend, late_build = native.choose(load(folder, native))
    assert late_build is None
    assert backend.name == "sdpa"
    assert "the library cannot be loaded" in caplog.text
    assert not damaged.exists()


def test_weights_that_cannot_be_read_while_packed_leave_torch(
    folder: Path,
    native_cache: Path,
    library: object,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def unreadable(*_: object) -> None:
        raise OSError("Input/output error")

    monkeypatch.setattr(select, "RecordedDecoder", unreadable)
    with caplog.at_level(logging.INFO):
        native = Native(native_cache, 2)
        backend, _ = native.choose(load(folder, native))
    assert backend.name == "sdpa"
    assert "the library cannot be loaded: Input/output error" in caplog.text


def test_a_compiler_that_cannot_run_leaves_torch(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(build, "find_compiler", lambda: str(folder))
    native = Native(folder, 2)
    assert not native.will_pack(dtype=torch.bfloat16, device=CPU)
    with caplog.at_level(logging.INFO):
        backend, _ = native.choose(load(folder, native))
    assert backend.name == "sdpa"
    assert "the library cannot be built" in caplog.text


def test_weights_are_left_in_their_files_for_a_library_that_is_built(
    native_cache: Path, tmp_path: Path, library: object
) -> None:
    native, cuda = Native(native_cache, 2), torch.device("cuda")
    assert native.will_pack(dtype=torch.bfloat16, device=CPU)
    assert not native.will_pack(dtype=torch.float32, device=CPU)
    assert not native.will_pack(dtype=torch.bfloat16, device=cuda)
    assert not Native(tmp_path, 2).will_pack(dtype=torch.bfloat16, device=CPU)


def test_weights_left_in_their_files_are_computed_with_in_torch_all_the_same(
    tmp_path: Path,
) -> None:
    AutoModelForCausalLM.from_config(CONFIGS["llama"]).bfloat16().save_pretrained(tmp_path)
    logits = []
    for defers in (False, True):
        runner = Runner(load_torch(tmp_path, dtype=torch.bfloat16, device=CPU, defers=defers))
        logits.append(runner.step((runner.add(range(9)), 9))[0])
    assert torch.equal(*logits)
