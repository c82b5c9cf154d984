import json
import re
from pathlib import Path

import pytest

from kagami_launcher.model import source as hub
from kagami_launcher.model.hub_cache import ModelNotFound
from kagami_launcher.model.source import content_key, max_positions, resolve


def make_model(folder: Path, *weights: str) -> Path:
    folder.mkdir(parents=True)
    for name in ("config.json", "tokenizer.json", *(weights or ("model.safetensors",))):
        (folder / name).write_text("{}")
    return folder


def test_a_folder_is_served_as_it_is(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "m")
    source = resolve(str(folder), revision=None, cache=tmp_path)
    assert source == hub.ModelSource(str(folder), folder)
    assert source.is_ready


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_folder_without_a_file_is_refused(tmp_path: Path, name: str) -> None:
    folder = make_model(tmp_path / "m")
    (folder / name).unlink()
    with pytest.raises(ModelNotFound, match=name.removeprefix("model")):
        resolve(str(folder), revision=None, cache=tmp_path)


def test_a_folder_with_half_its_weights_is_refused(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "m", "a.safetensors")
    index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelNotFound, match="1 of 2 weight files are missing"):
        resolve(str(folder), revision=None, cache=tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}'),
        *('{"weight_map": {"x": 1}}', '{"weight_map": {"x": ["a.safetensors"]}}'),
    ],
)
def test_a_broken_index_is_named(tmp_path: Path, text: str) -> None:
    index = make_model(tmp_path / "m") / "model.safetensors.index.json"
    index.write_text(text)
    with pytest.raises(ModelNotFound, match=re.escape(str(index))):
        resolve(str(index.parent), revision=None, cache=tmp_path)


def test_a_hub_model_is_found_in_the_cache(tmp_path: Path) -> None:
    repository = tmp_path / "models--org--name"
    snapshot = make_model(repository / "snapshots" / "abc")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    for revision in (None, "main", "abc"):
        source = resolve("org/name", revision=revision, cache=tmp_path)
        assert (source.model_id, source.folder) == ("org/name", snapshot)


def test_a_gguf_file_from_the_hub_is_to_be_converted(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--org--name" / "snapshots" / "main"
    snapshot.mkdir(parents=True)
    (snapshot / "Tiny.gguf").write_bytes(b"x" * 100)
    source = resolve("org/name", revision=None, cache=tmp_path)
    assert source.origin == snapshot / "Tiny.gguf"
    assert source.folder.parts[-3] == "models--kagami--Tiny"


def test_a_folder_can_stand_for_the_hub(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "repository")
    source = hub.overridden("org/name", folder, tmp_path)
    assert (source.model_id, source.folder) == ("org/name", folder)
    index = {"weight_map": {"x": "b.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ModelNotFound) as missing:
        hub.overridden("org/name", folder, tmp_path)
    assert str(missing.value) == f"File {folder}/b.safetensors not found in {folder}."


@pytest.mark.parametrize(
    ("model_id", "is_hubs"),
    [("org/name", True), ("gpt2", True), ("a/b/c", False), ("./a", False), ("x.gguf", False)],
)
def test_a_name_is_the_hubs_if_nothing_local_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_id: str, is_hubs: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    assert hub.is_hub_id(model_id) is is_hubs
    Path("gpt2").mkdir()
    assert not hub.is_hub_id("gpt2")
    assert not hub.is_hub_id(hub.EMBEDDED_MODEL_ID)


def test_a_hub_model_that_is_not_cached_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound) as missing:
        resolve("org/name", revision="v1", cache=tmp_path)
    assert str(missing.value) == (
        f"model org/name at revision v1 is not in the hub cache {tmp_path}: "
        "run `text-generation-server download-weights org/name` with a network"
    )


@pytest.mark.parametrize("model_id", ["/no/such/folder", "./none", "none.gguf", "a/b/c"])
def test_a_path_that_does_not_exist_is_refused(tmp_path: Path, model_id: str) -> None:
    with pytest.raises(ModelNotFound, match="does not exist"):
        resolve(model_id, revision=None, cache=tmp_path)


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.bin").touch()
    with pytest.raises(ModelNotFound, match=r"not a \.gguf file"):
        resolve(str(tmp_path / "model.bin"), revision=None, cache=tmp_path)


def test_a_gguf_file_is_to_be_converted_once(tmp_path: Path) -> None:
    file = tmp_path / "Tiny.gguf"
    file.write_bytes(b"x" * 100)
    source = resolve(str(file), revision=None, cache=tmp_path / "hub")
    assert source.origin == file
    assert source.folder.parent == tmp_path / "hub" / "models--kagami--Tiny" / "snapshots"
    assert not source.is_ready
    make_model(source.folder)
    assert source.is_ready


def test_the_embedded_model_is_found_without_importing_it(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    source = resolve(hub.EMBEDDED_MODEL_ID, revision=None, cache=tmp_path)
    assert source.origin is not None
    assert source.origin.name == "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert source.model_id == "kagami/SmolLM2-135M-Instruct"


def test_a_missing_embedded_model_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "_EMBEDDED_PACKAGE", "no_such_package")
    with pytest.raises(ModelNotFound, match=r"pip install 'kagami-tgi\[demo\]'"):
        resolve(hub.EMBEDDED_MODEL_ID, revision=None, cache=tmp_path)


def test_the_key_follows_the_content(tmp_path: Path) -> None:
    one, two, three = (tmp_path / name for name in "abc")
    one.write_bytes(b"x" * 1_000_000)
    two.write_bytes(b"x" * 1_000_000)
    three.write_bytes(b"x" * 999_999 + b"y")
    assert content_key(one) == content_key(two) != content_key(three)
    assert len(content_key(one)) == 40


@pytest.mark.parametrize(
    ("config", "positions"),
    [
        ({"max_position_embeddings": 8}, 8),
        ({"n_positions": 9}, 9),
        ({"text_config": {"max_position_embeddings": 7}}, 7),
        ({}, None),
    ],
)
def test_positions_are_read_under_every_name(
    config: dict[str, object], positions: int | None
) -> None:
    assert max_positions(config) == positions


@pytest.mark.parametrize("text", ["[]", "{", ""])
def test_a_broken_config_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelNotFound):
        hub.read_config(tmp_path)


@pytest.mark.parametrize("value", [0, -5, 2**31, 10**300, True, "128", 128.0, None, [128]])
def test_a_length_that_no_model_has_is_left_to_the_shard(value: object) -> None:
    assert hub.max_positions({"max_position_embeddings": value}) is None
    assert hub.max_positions({"max_position_embeddings": value, "n_positions": 7}) == 7
