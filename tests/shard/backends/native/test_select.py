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
from kagami_shard.backends.native.select import switch_to_native, will_pack
from kagami_shard.backends.torch.sdpa import SdpaAttention
from kagami_shard.engine.engine import Engine
from kagami_shard.models.base import Model
from kagami_shard.models.registry import load_model

CPU = torch.device("cpu")


def engine_of(model: Model, dtype: torch.dtype) -> Engine:
    return Engine(model, SdpaAttention(), dtype=dtype, device=CPU, block_size=4)


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    needs_library()
    AutoModelForCausalLM.from_config(CONFIGS["llama"]).save_pretrained(tmp_path)
    return engine_of(load_model(tmp_path, dtype=torch.bfloat16, device=CPU), torch.bfloat16)


def test_a_built_library_serves_at_once(
    engine: Engine, native_cache: Path, library: object
) -> None:
    later = switch_to_native(
        engine, dtype=torch.bfloat16, device=CPU, cache=native_cache, num_threads=2
    )
    assert later is None
    assert isinstance(engine.model, RecordedDecoder)
    assert engine.attention_name == "native"


def test_without_the_library_torch_serves_until_it_is_built(
    engine: Engine,
    tmp_path: Path,
    native_cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    library: object,
) -> None:
    built = select.build(native_cache)
    later = switch_to_native(
        engine, dtype=torch.bfloat16, device=CPU, cache=tmp_path, num_threads=2
    )
    assert later is not None
    assert engine.attention_name == "sdpa"
    monkeypatch.setattr(select, "build", lambda cache: built)
    later._build(lambda switch: switch())
    assert engine.attention_name == "native"


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
    engine = engine_of(TinyModel(), dtype)
    with caplog.at_level(logging.INFO):
        assert (
            switch_to_native(engine, dtype=dtype, device=device, cache=tmp_path, num_threads=1)
            is None
        )
    assert f"CPU kernels: torch, because {reason}" in caplog.text


def test_a_library_that_disagrees_is_not_used(
    engine: Engine,
    native_cache: Path,
    library: object,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(select, "agrees_with_torch", lambda runtime: False)
    with caplog.at_level(logging.INFO):
        switch_to_native(
            engine, dtype=torch.bfloat16, device=CPU, cache=native_cache, num_threads=2
        )
    assert engine.attention_name == "sdpa"
    assert "the library disagrees with torch" in caplog.text


def test_a_damaged_library_is_not_used_and_makes_room_for_another(
    engine: Engine, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    compiler = find_compiler()
    assert compiler is not None
    damaged = library_path(tmp_path, compiler)
    damaged.write_bytes(b"")
    with caplog.at_level(logging.INFO):
        later = switch_to_native(
            engine, dtype=torch.bfloat16, device=CPU, cache=tmp_path, num_threads=2
        )
    assert later is None
    assert engine.attention_name == "sdpa"
    assert "the library cannot be loaded" in caplog.text
    assert not damaged.exists()


def test_weights_that_cannot_be_read_while_packed_leave_torch(
    engine: Engine,
    native_cache: Path,
    library: object,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def unreadable(*_: object) -> None:
        raise OSError("Input/output error")

    monkeypatch.setattr(select, "RecordedDecoder", unreadable)
    with caplog.at_level(logging.INFO):
        switch_to_native(
            engine, dtype=torch.bfloat16, device=CPU, cache=native_cache, num_threads=2
        )
    assert engine.attention_name == "sdpa"
    assert "the library cannot be loaded: Input/output error" in caplog.text


def test_a_compiler_that_cannot_run_leaves_torch(
    engine: Engine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(build, "find_compiler", lambda: str(tmp_path))
    assert not will_pack(dtype=torch.bfloat16, device=CPU, cache=tmp_path)
    with caplog.at_level(logging.INFO):
        switch_to_native(engine, dtype=torch.bfloat16, device=CPU, cache=tmp_path, num_threads=2)
    assert engine.attention_name == "sdpa"
    assert "the library cannot be built" in caplog.text


def test_weights_are_left_in_their_files_for_a_library_that_is_built(
    native_cache: Path, tmp_path: Path, library: object
) -> None:
    wanted = {"dtype": torch.bfloat16, "device": CPU, "cache": native_cache}
    others = [{"dtype": torch.float32}, {"device": torch.device("cuda")}, {"cache": tmp_path}]
    assert will_pack(**wanted)
    assert not any(will_pack(**(wanted | other)) for other in others)


def test_weights_left_in_their_files_are_computed_with_in_torch_all_the_same(
    tmp_path: Path,
) -> None:
    AutoModelForCausalLM.from_config(CONFIGS["llama"]).bfloat16().save_pretrained(tmp_path)
    logits = []
    for defers in (False, True):
        model = load_model(tmp_path, dtype=torch.bfloat16, device=CPU, defers=defers)
        runner = Runner(model, dtype=torch.bfloat16)
        logits.append(runner.step((runner.add(range(9)), 9))[0])
    assert torch.equal(*logits)
