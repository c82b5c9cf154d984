import pytest

from kagami_launcher.download.files import NoWeights, RemoteFile, Selection, select


def choose(*names: str, extension: str = ".safetensors", **more: bool) -> Selection:
    return select([RemoteFile(name, 1) for name in names], extension=extension, **more)


def weights(*names: str) -> list[str]:
    return [file.name for file in choose(*names).weights]


def texts(*names: str, **more: bool) -> list[str]:
    return [file.name for file in choose("model.safetensors", *names, **more).texts]


def test_safetensors_come_before_pickles() -> None:
    assert weights("pytorch_model.bin", "model.safetensors") == ["model.safetensors"]
    assert weights("pytorch_model.bin", "x.gguf") == ["pytorch_model.bin"]
    assert weights("model.pt", "x.gguf") == ["model.pt"]
    assert weights("x.gguf") == ["x.gguf"]


def test_one_copy_of_the_weights_is_enough() -> None:
    parts = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert weights(*parts, "consolidated.safetensors", "model.fp16.safetensors") == parts
    assert weights("consolidated.safetensors") == ["consolidated.safetensors"]


def test_heads_and_adapters_are_wanted_too() -> None:
    names = ["medusa_lm_head.safetensors", "model.safetensors"]
    assert weights(*names) == names


def test_folders_and_a_trainers_files_are_no_weights() -> None:
    with pytest.raises(NoWeights, match=r"No \.safetensors weights found"):
        choose("training_args.bin", "original/consolidated.safetensors", "arguments.pt")


def test_several_gguf_files_are_a_choice_for_people() -> None:
    with pytest.raises(NoWeights, match=r"a choice of weights \(a\.gguf, b\.gguf\)"):
        choose("a.gguf", "b.gguf")


def test_another_kind_is_taken_only_if_it_may() -> None:
    with pytest.raises(NoWeights):
        choose("pytorch_model.bin", allow_others=False)
    chosen = choose("model.safetensors", "pytorch_model.bin", extension=".bin")
    assert [file.name for file in chosen.weights] == ["pytorch_model.bin"]


def test_what_a_server_reads_is_wanted() -> None:
    names = ["chat_template.jinja", "config.json", "generation_config.json", "merges.txt"]
    names += ["tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.txt"]
    unwanted = [
        "README.md",
        "trainer_state.json",
        "all_results.json",
        "logo.png",
        "onnx/config.json",
    ]
    assert texts(*names, *unwanted) == names


def test_named_chat_templates_are_wanted() -> None:
    named = "additional_chat_templates/tool_use.jinja"
    assert texts("chat_template.jinja", named, "old/a.jinja") == ["chat_template.jinja", named]


def test_only_the_index_of_these_weights_is_wanted() -> None:
    index = "model.safetensors.index.json"
    assert texts(index, "pytorch_model.bin.index.json") == [index]


def test_code_is_wanted_only_where_it_is_trusted() -> None:
    assert texts("modeling.py") == []
    assert texts("modeling.py", trust_remote_code=True) == ["modeling.py"]
