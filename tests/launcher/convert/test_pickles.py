"""Pickled weights become safetensors: all of them, exactly, once, or not at all."""

import json
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from kagami_launcher.convert import pickles as convert_torch
from kagami_launcher.convert.files import ConversionRefused
from kagami_launcher.convert.pickles import read_pickle, safetensors_name
from kagami_launcher.convert.run import Task, convert, main
from kagami_launcher.model import folder as model_folder
from kagami_launcher.model import source as hub
from kagami_proto import logs

BASE = "model.embed_tokens.weight"


def save(path: Path, value: Any, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(value, path, **options)
    return path


def make_folder(folder: Path, *shards: dict[str, Tensor], **config: Any) -> Path:
    """A Llama's folder with pickled weights, as `save_pretrained` wrote it until 2023."""
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], **config}
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "tokenizer.json").write_text("{}")
    if len(shards) == 1:
        save(folder / "pytorch_model.bin", shards[0])
        return folder
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        name = f"pytorch_model-{number:05d}-of-{len(shards):05d}.bin"
        save(folder / name, shard)
        weight_map |= dict.fromkeys(shard, name)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    return folder


def in_place(folder: Path) -> Task:
    return Task(folder, folder, model_id="org/name")


def weights() -> dict[str, Tensor]:
    torch.manual_seed(0)
    fused = torch.randn(12, 4)
    special = torch.tensor([float("nan"), float("inf"), -0.0])
    return {
        BASE: torch.randn(5, 4).bfloat16(),
        "transposed": torch.randn(4, 6).T,
        "first": fused[:8],
        "second": fused[4:],
        "special": special.half(),
        "scalar": torch.tensor(7),
        "empty": torch.empty(0, 3),
        "parameter": torch.nn.Parameter(torch.randn(3)),
        "mask": torch.tensor([True, False]),
    }


def same(one: Tensor, other: Tensor) -> bool:
    as_bytes = [t.detach().contiguous().reshape(-1).view(torch.uint8) for t in (one, other)]
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(*as_bytes)


@pytest.mark.parametrize("options", [{}, {"_use_new_zipfile_serialization": False}])
def test_every_tensor_comes_out_as_it_went_in(tmp_path: Path, options: dict[str, Any]) -> None:
    folder = make_folder(tmp_path / "m", weights())
    save(folder / "pytorch_model.bin", weights(), **options)
    convert(in_place(folder))
    found = load_file(folder / "model.safetensors")
    assert found.keys() == weights().keys()
    assert all(same(found[name], tensor) for name, tensor in weights().items())
    assert hub.resolve(str(folder), revision=None, cache=tmp_path).is_ready


def test_shards_get_an_index(tmp_path: Path) -> None:
    one, two = {"a": torch.ones(2)}, {"b": torch.ones(3, dtype=torch.int8)}
    folder = make_folder(tmp_path / "m", one, two)
    convert(in_place(folder))
    assert json.loads((folder / model_folder.INDEX).read_text()) == {
        "metadata": {"total_size": 11},
        "weight_map": {
            "a": "model-00001-of-00002.safetensors",
            "b": "model-00002-of-00002.safetensors",
        },
    }
    assert not model_folder.problem(folder)


@pytest.mark.parametrize("is_tied", [True, False])
def test_a_tied_name_is_written_once_and_an_untied_one_is_not_lost(
    tmp_path: Path, is_tied: bool
) -> None:
    shared = torch.randn(5, 4)
    both = {"lm_head.weight": shared, BASE: shared}
    folder = make_folder(tmp_path / "m", both, tie_word_embeddings=is_tied)
    convert(in_place(folder))
    found = load_file(folder / "model.safetensors")
    assert found.keys() == ({BASE} if is_tied else {BASE, "lm_head.weight"})
    assert all(same(tensor, shared) for tensor in found.values())
    with safe_open(folder / "model.safetensors", "pt") as file:
        dropped = {"lm_head.weight": BASE} if is_tied else {}
        assert file.metadata() == {"format": "pt", **dropped}


def test_pt_files_and_state_dicts_are_read(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m", {"a": torch.ones(2)})
    (folder / "pytorch_model.bin").unlink()
    save(folder / "weights.pt", {"state_dict": {"a": torch.ones(2)}, "epoch": 3})
    save(folder / "optimizer.pt", {"a": torch.zeros(2)})
    convert(in_place(folder))
    assert list(folder.glob("*.safetensors")) == [folder / "weights.safetensors"]
    assert load_file(folder / "weights.safetensors")["a"].tolist() == [1, 1]


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("pytorch_model.bin", "model.safetensors"),
        ("pytorch_model-00001-of-00002.bin", "model-00001-of-00002.safetensors"),
        ("model.pt", "model.safetensors"),
    ],
)
def test_names_are_tgis(file: str, name: str) -> None:
    assert safetensors_name(Path(file)) == name


class Payload:
    """What makes a pickle dangerous."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)


@pytest.fixture
def refusal(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> Callable[..., str]:
    """What the child would say last as it ends with 1; a child imports torch for two seconds."""
    monkeypatch.setattr(logs, "configure", lambda *_, **__: None)

    def refused(folder: Path, *flags: str) -> str:
        assert main([str(folder), str(folder), "--model-id", "org/name", *flags]) == 1
        *_, last = caplog.records
        assert (last.levelname, last.exc_info) == ("ERROR", None)
        return last.getMessage()

    return refused


def run_child(folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, "-P", "-m", "kagami_launcher.convert", str(folder), str(folder)]
    argv += ["--model-id", "org/name", *flags]
    return subprocess.run(argv, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("flags", [(), ("--trust-remote-code",)])
def test_code_in_a_pickle_is_never_run(
    tmp_path: Path, refusal: Callable[..., str], flags: tuple[str, ...]
) -> None:
    folder = make_folder(tmp_path / "m", {"a": torch.ones(1)})
    save(folder / "pytorch_model.bin", {"a": torch.ones(1), "b": Payload(tmp_path / "ran")})
    message = refusal(folder, *flags)
    assert f"Cannot convert {folder}: pytorch_model.bin is not a plain file" in message
    assert "`--trust-remote-code`" in message
    assert not (tmp_path / "ran").exists()
    assert not list(folder.glob("*.safetensors*"))


@pytest.mark.parametrize("flags", [(), ("--trust-remote-code",)])
def test_tgis_lines_are_said(tmp_path: Path, flags: tuple[str, ...]) -> None:
    folder = make_folder(tmp_path / "m", {"a": torch.ones(1)}, {"b": torch.ones(1)})
    lines = [json.loads(line) for line in run_child(folder, *flags).stdout.splitlines()]
    said = [(line["level"], line["message"].partition(":")[0]) for line in lines]
    warned = [("WARN", "🚨🚨BREAKING CHANGE in 2.0🚨🚨")] if not flags else []
    no_weights = (
        "No safetensors weights found for model org/name at revision None. "
        "Converting PyTorch weights to safetensors."
    )
    assert said == [*warned, ("WARN", no_weights), ("INFO", "Convert"), ("INFO", "Convert")]
    assert lines[-1]["message"].startswith("Convert: [2/2] -- Took: 0:00:0")


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ([torch.ones(1)], "holds a list"),
        ({"a": torch.ones(1), "step": 3}, "`step` is a int"),
        ({"a": torch.ones(2, dtype=torch.complex64)}, "`a` is torch.strided, torch.complex64"),
        ({"a": torch.eye(2).to_sparse()}, "`a` is torch.sparse_coo"),
    ],
)
def test_what_is_no_weight_is_refused_by_name(tmp_path: Path, value: Any, why: str) -> None:
    with pytest.raises(ConversionRefused, match=f"file.bin.* {why}"):
        read_pickle(save(tmp_path / "file.bin", value))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("content", [b"", b"version https://git-lfs", pickle.dumps(3)[:4]])
def test_a_broken_file_is_named(
    tmp_path: Path, refusal: Callable[..., str], content: bytes
) -> None:
    folder = make_folder(tmp_path / "m", {"a": torch.ones(1)})
    (folder / "pytorch_model.bin").write_bytes(content)
    assert "pytorch_model.bin" in refusal(folder)


def test_a_broken_file_is_one_error_line(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m", {"a": torch.ones(1)})
    (folder / "pytorch_model.bin").write_bytes(b"")
    done = run_child(folder)
    assert done.returncode == 1
    assert "Traceback" not in done.stdout + done.stderr
    assert "pytorch_model.bin" in json.loads(done.stdout.splitlines()[-1])["message"]


def test_a_file_that_was_written_wrongly_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_folder(tmp_path / "m", {"a": torch.ones(1)})
    right = convert_torch.stored
    wrong = {"a": torch.zeros(1)}
    monkeypatch.setattr(convert_torch, "stored", lambda name, _: right(name, wrong[name]))
    with pytest.raises(RuntimeError, match="The output tensors do not match for key a"):
        convert(in_place(folder))
    assert not list(folder.glob("*model.safetensors*"))


# Converts as the launcher's child does, and is killed where it would give a file its name.
KILLED_AT_THE_NAME = """
import os, pathlib, signal, sys
from kagami_launcher.convert.run import main
rename = pathlib.Path.rename
def rename_or_die(self, target):
    if pathlib.Path(target).name == "model-00002-of-00002.safetensors":
        os.kill(os.getpid(), signal.SIGKILL)
    return rename(self, target)
pathlib.Path.rename = rename_or_die
main(sys.argv[1:])
"""


def test_a_conversion_killed_in_the_middle_goes_on_where_it_was(tmp_path: Path) -> None:
    big = {"big": torch.randn(20_000)}
    folder = make_folder(tmp_path / "m", {"a": torch.ones(1)}, big)
    argv = [sys.executable, "-Pc", KILLED_AT_THE_NAME, str(folder), str(folder)]
    killed = subprocess.run(argv, stdout=subprocess.DEVNULL, timeout=60, check=False)
    half = folder / ".model-00002-of-00002.safetensors.incomplete"
    assert killed.returncode == -signal.SIGKILL
    assert half.exists()
    assert model_folder.problem(folder).startswith("1 of 2 weight files are missing")
    first = folder / "model-00001-of-00002.safetensors"
    before = (first.stat().st_ino, first.stat().st_mtime_ns)
    convert(in_place(folder))
    assert (first.stat().st_ino, first.stat().st_mtime_ns) == before
    assert same(load_file(folder / "model-00002-of-00002.safetensors")["big"], big["big"])
    assert not half.exists()
    assert not model_folder.problem(folder)


def test_a_folder_that_cannot_be_written_to_is_converted_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_folder(tmp_path / "m", {"a": torch.ones(2)}, {"b": torch.ones(3)})
    monkeypatch.setattr(hub.os, "access", lambda *_: False)  # tests may run as root
    before = sorted(os.listdir(folder))
    source = hub.resolve(str(folder), revision=None, cache=tmp_path / "hub")
    assert source.folder.parent == tmp_path / "hub" / "models--kagami--m" / "snapshots"
    assert not source.is_ready
    assert source.origin is not None
    convert(Task(source.origin, source.folder))
    assert source.is_ready
    assert hub.resolve(str(folder), revision=None, cache=tmp_path / "hub").is_ready
    assert sorted(os.listdir(folder)) == before
    assert (source.folder / "config.json").read_bytes() == (folder / "config.json").read_bytes()


def test_missing_parts_of_a_download_are_told(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "m", {"a": torch.ones(2)}, {"b": torch.ones(3)})
    (folder / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(hub.ModelNotFound, match="1 of 2 weight files are missing"):
        hub.resolve(str(folder), revision=None, cache=tmp_path / "hub")
