import json
from pathlib import Path

import pytest

from kagami_proto.errors import InvalidRequest, TemplateError
from kagami_router.text import chat_template, tokenizer
from kagami_router.text.chat_template import PromptOptions
from kagami_router.text.templates.files import sources

# In the order of precedence.
NAMES = [
    "chat_template.jinja",
    "chat_template.json",
    "tokenizer_config.json",
    "processor_config.json",
]
USER = [{"role": "user", "content": "Hi"}]


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text if path.suffix == ".jinja" else json.dumps({"chat_template": text}))
    return path


def rendered(folder: Path, given: Path | None = None, **options: object) -> str:
    tokens = tokenizer.special_tokens(folder, given)
    return chat_template.load(folder, tokens, given).render(USER, PromptOptions(**options))


@pytest.mark.parametrize("first", range(len(NAMES)))
def test_the_first_file_wins(tmp_path: Path, first: int) -> None:
    for name in NAMES[first:]:
        write(tmp_path / name, name)
    assert rendered(tmp_path) == NAMES[first]


@pytest.mark.parametrize("name", ["given.json", "given.jinja"])
def test_a_given_file_wins_over_all(tmp_path: Path, name: str) -> None:
    for other in (*NAMES, "additional_chat_templates/tool_use.jinja"):
        write(tmp_path / other, other)
    given = write(tmp_path / name, "given")
    assert rendered(tmp_path, given) == rendered(tmp_path, given, tools=[]) == "given"


def test_a_given_file_without_a_template_leaves_the_models(tmp_path: Path) -> None:
    write(tmp_path / NAMES[0], "{{ eos_token }}")
    given = tmp_path / "given.json"
    given.write_text('{"eos_token": "<end>"}')
    assert rendered(tmp_path, given) == "<end>"


def test_a_given_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"--tokenizer-config-path .*none\.json"):
        sources(tmp_path, tmp_path / "none.json")


@pytest.mark.parametrize(
    "named",
    [
        [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}],
        {"default": "plain", "tool_use": "tools"},
    ],
)
def test_tools_choose_the_template_for_tools(tmp_path: Path, named: object) -> None:
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert (rendered(tmp_path), rendered(tmp_path, tools=[{}])) == ("plain", "tools")


def test_additional_templates_stand_beside_the_default(tmp_path: Path) -> None:
    write(tmp_path / "chat_template.jinja", "plain")
    write(tmp_path / "additional_chat_templates" / "tool_use.jinja", "tools")
    write(tmp_path / "additional_chat_templates" / "rag.jinja", "rag")
    assert rendered(tmp_path) == "plain"
    assert rendered(tmp_path, tools=[]) == "tools"
    assert rendered(tmp_path, template="rag") == "rag"


def test_a_template_in_a_request_is_refused_with_the_known_names(tmp_path: Path) -> None:
    write(tmp_path / "chat_template.jinja", "plain")
    with pytest.raises(InvalidRequest, match=r"`chat_template` may name .*\(default\)"):
        rendered(tmp_path, template="{{ messages }}")


def test_a_model_without_a_default_says_which_names_it_has(tmp_path: Path) -> None:
    named = [{"name": "rag", "template": "rag"}, {"name": "odd"}, 3]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    with pytest.raises(TemplateError, match="name one of rag"):
        rendered(tmp_path)


def test_a_broken_template_is_named_by_its_file(tmp_path: Path) -> None:
    write(tmp_path / "chat_template.jinja", "plain")
    write(tmp_path / "additional_chat_templates" / "tool_use.jinja", "{% if %}")
    with pytest.raises(TemplateError, match=r"tool_use\.jinja does not compile"):
        rendered(tmp_path)


def test_an_old_map_of_special_tokens_goes_first(tmp_path: Path) -> None:
    write(tmp_path / "chat_template.jinja", "{{ bos_token }}{{ eos_token }}")
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<a>", "eos_token": "<b>"}')
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": {"content": "<c>"}}')
    assert rendered(tmp_path) == "<a><c>"


def test_a_config_that_describes_its_tokens_needs_no_map(tmp_path: Path) -> None:
    write(tmp_path / "chat_template.jinja", "{{ eos_token }}")
    (tmp_path / "tokenizer_config.json").write_text(
        '{"eos_token": "<b>", "added_tokens_decoder": {}}'
    )
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": "<c>"}')
    assert rendered(tmp_path) == "<b>"


def test_extra_special_tokens_have_names_too(tmp_path: Path) -> None:
    write(tmp_path / "chat_template.jinja", "{{ image_token }}")
    extra = {"extra_special_tokens": {"image_token": "<img>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(extra))
    assert rendered(tmp_path) == "<img>"
