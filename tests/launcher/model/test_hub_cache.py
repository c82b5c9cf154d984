import json
from pathlib import Path

import pytest

from kagami_launcher.model.hub_cache import (
    ModelNotFound,
    cache_folder,
    cached_snapshot,
    is_offline,
    is_pinned,
    will_do,
)

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def snapshot(tmp_path: Path) -> Path:
    """A complete snapshot of org/name, that `main` means."""
    repository = tmp_path / "models--org--name"
    folder = repository / "snapshots" / COMMIT
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").touch()
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    return folder


def asks_nobody(cache: Path, revision: str | None = None, **more: bool) -> bool:
    choices = {"is_offline": False, "trust_remote_code": False, **more}
    return will_do("org/name", revision, cache, **choices)


@pytest.mark.parametrize(
    ("flag", "environ", "folder"),
    [
        ("/flag", {"HUGGINGFACE_HUB_CACHE": "/a"}, "/flag"),
        (None, {"HUGGINGFACE_HUB_CACHE": "/a", "HF_HUB_CACHE": "/b"}, "/a"),
        (None, {"HF_HUB_CACHE": "/b", "HF_HOME": "/c"}, "/b"),
        (None, {"HF_HOME": "/c", "HOME": "/root"}, "/c/hub"),
        (None, {"XDG_CACHE_HOME": "/d", "HOME": "/root"}, "/d/huggingface/hub"),
        (None, {"HOME": "/root"}, "/root/.cache/huggingface/hub"),
    ],
)
def test_the_cache_lies_where_hugging_faces_tools_look(
    flag: str | None, environ: dict[str, str], folder: str
) -> None:
    assert cache_folder(flag, environ) == Path(folder)


@pytest.mark.parametrize("value", ["1", "true", "YES", "on"])
@pytest.mark.parametrize("name", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_offline_has_two_names(name: str, value: str) -> None:
    assert is_offline({name: value})
    assert not is_offline({name: "0"})
    assert not is_offline({})


def test_only_a_whole_commit_is_pinned() -> None:
    assert is_pinned(COMMIT)
    assert not any(is_pinned(revision) for revision in (None, "main", COMMIT[:7]))


def test_a_branch_is_asked_for_and_a_commit_is_not(tmp_path: Path, snapshot: Path) -> None:
    assert not asks_nobody(tmp_path)
    assert asks_nobody(tmp_path, COMMIT)
    assert asks_nobody(tmp_path, is_offline=True)


def test_offline_without_the_files_is_an_error_that_names_the_variables(tmp_path: Path) -> None:
    assert not asks_nobody(tmp_path, COMMIT)
    with pytest.raises(ModelNotFound, match="or unset HF_HUB_OFFLINE and TRANSFORMERS_OFFLINE"):
        asks_nobody(tmp_path, COMMIT, is_offline=True)


def test_code_that_would_be_run_has_to_be_there(tmp_path: Path, snapshot: Path) -> None:
    (snapshot / "config.json").write_text(
        json.dumps({"auto_map": {"AutoModel": "modeling.Model", "AutoConfig": "org/x--conf.C"}})
    )
    assert asks_nobody(tmp_path, COMMIT)
    assert not asks_nobody(tmp_path, COMMIT, trust_remote_code=True)
    (snapshot / "modeling.py").touch()
    assert asks_nobody(tmp_path, COMMIT, trust_remote_code=True)


def test_an_adapter_is_not_alone(tmp_path: Path, snapshot: Path) -> None:
    (snapshot / "adapter_config.json").write_text("{}")
    assert not asks_nobody(tmp_path, COMMIT)


def test_an_index_tells_which_weights_there_must_be(tmp_path: Path, snapshot: Path) -> None:
    index = {"weight_map": {"x": "model.safetensors", "y": "other.safetensors"}}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelNotFound, match="is not in the hub cache"):
        cached_snapshot("org/name", None, tmp_path)
    (snapshot / "pytorch_model.bin").touch()
    assert cached_snapshot("org/name", None, tmp_path) == snapshot


def test_an_index_that_cannot_be_read_is_named(tmp_path: Path, snapshot: Path) -> None:
    (snapshot / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(ModelNotFound, match=r"cannot read .*index\.json"):
        cached_snapshot("org/name", None, tmp_path)
