import json
from pathlib import Path

import pytest

from kagami_proto.errors import TemplateError
from kagami_router.text import chat_template
from kagami_router.text.chat_template import ChatTemplate, MissingTemplate
from kagami_router.text.tokenizer import SpecialTokens

TOKENS = SpecialTokens("<s>", "</s>", {"pad_token": "<pad>"})
USER = [{"role": "user", "content": "Hi"}]
# The form of the embedded model's template.
CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content']"
    " + '<|im_end|>' + '\\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def render(source: str, messages: list | None = None) -> str:
    return ChatTemplate(source, TOKENS).render(messages or USER)


def test_blocks_are_trimmed_as_in_transformers() -> None:
    source = (
        "{% for m in messages %}\n    {% if true %}\n{{ m.content }}\n    {% endif %}\n"
        "{% endfor %}\n."
    )
    assert render(source) == "Hi\n."


def test_tojson_escapes_nothing() -> None:
    assert render("{{ {'a': '<é>'} | tojson }}") == '{"a": "<é>"}'
    assert render("{{ [1] | tojson(indent=1) }}") == "[\n 1\n]"


def test_variables_and_functions() -> None:
    assert render("{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ tools is none }}") == (
        "<s></s><pad>True"
    )
    assert render("{{ add_generation_prompt }}") == "True"
    assert render("{{ strftime_now('%Y') | length }}") == "4"


def test_loop_controls_and_the_generation_tag_are_known() -> None:
    source = (
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% break %}"
        "{% endfor %}"
    )
    assert render(source, USER * 2) == "Hi"


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ raise_exception('only user') }}", "only user"),
        ("{{ nothing.at.all }}", "undefined value: "),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ messages + 1 }}", "TypeError"),
        ("{{ messages.append(1) }}", ""),
        ("{{ ''.__class__.__mro__ }}", ""),
    ],
)
def test_what_a_template_does_wrong_is_a_template_error(source: str, text: str) -> None:
    with pytest.raises(TemplateError) as refused:
        render(source)
    assert text in str(refused.value)


def test_messages_reach_the_template_unchanged() -> None:
    message = {"role": "tool", "content": "x", "name": "f", "tool_call_id": "7"}
    assert render("{{ messages[0].name }}{{ messages[0].tool_call_id }}", [message]) == "f7"


@pytest.mark.parametrize(
    ("content", "expected"),
    [("Sure", "[user]Hi[assistant]Sure"), ("Sure  ", "[user]Hi[assistant]Sure"), ("", None)],
)
def test_the_assistants_last_message_is_continued(content: str, expected: str | None) -> None:
    source = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}</s>"
    messages = [*USER, {"role": "assistant", "content": content}]
    assert render(source, messages) == (expected or "[user]Hi[assistant]</s>")


@pytest.mark.parametrize("content", ["a", "e", "|", "end", "assistant"])
def test_the_continued_text_is_not_looked_for_in_the_markup(content: str) -> None:
    messages = [*USER, {"role": "assistant", "content": content}]
    assert render(CHATML, messages) == (
        f"<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n{content}"
    )


def test_a_template_that_prints_no_such_text_is_asked_for_a_new_message() -> None:
    source = "{{ messages[0].content }}{% if add_generation_prompt %}>{% endif %}"
    assert render(source, [*USER, {"role": "assistant", "content": "Sure"}]) == "Hi>"


CALLS = [{"id": "0", "type": "function", "function": {"name": "f", "arguments": "{}"}}]
ASSISTANT = {"role": "assistant", "tool_calls": CALLS}
TOOL = {"role": "tool", "content": "7", "tool_call_id": "0"}


@pytest.mark.parametrize("turn", [ASSISTANT, {**ASSISTANT, "content": None}])
def test_a_template_that_knows_no_tool_calls_gets_them_as_text(turn: dict) -> None:
    assert render(CHATML, [*USER, turn, TOOL]) == (
        "<|im_start|>user\nHi<|im_end|>\n"
        '<|im_start|>assistant\n[{"id":"0","type":"function","function":{"name":"f",'
        '"arguments":"{}"}}]<|im_end|>\n'
        "<|im_start|>tool\n7<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize("turn", [ASSISTANT, {**ASSISTANT, "content": None}])
@pytest.mark.parametrize(
    "condition",
    ["m.tool_calls is defined", "'tool_calls' in m", "m['content'] is none", "not m.content"],
)
def test_a_template_that_reads_tool_calls_finds_them_and_an_empty_content(
    turn: dict, condition: str
) -> None:
    source = (
        "{% for m in messages %}[{{ m.role + m.content + '' }}{{ m.content }}]"
        f"{{% if {condition} %}}"
        "{{ m.tool_calls[0].function.name }}{% endif %}{% endfor %}"
    )
    assert render(source, [*USER, turn]) == "[userHiHi][assistant]f"


def test_the_jinja_file_wins(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("jinja")
    (tmp_path / "chat_template.json").write_text(json.dumps({"chat_template": "json"}))
    assert chat_template.load(tmp_path, TOKENS).render(USER) == "jinja"


def test_the_config_given_by_flag_wins(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("jinja")
    given = tmp_path / "other.json"
    given.write_text(json.dumps({"chat_template": "given"}))
    assert chat_template.load(tmp_path, TOKENS, given).render(USER) == "given"


def test_the_default_of_named_templates_is_taken(tmp_path: Path) -> None:
    named = [{"name": "rag", "template": "rag"}, {"name": "default", "template": "plain"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert chat_template.load(tmp_path, TOKENS).render(USER) == "plain"


def test_without_a_template_the_files_looked_for_are_named(tmp_path: Path) -> None:
    template = chat_template.load(tmp_path, TOKENS)
    assert isinstance(template, MissingTemplate)
    with pytest.raises(TemplateError, match=r"template not found.*chat_template\.jinja"):
        template.render(USER)


def test_a_template_that_does_not_compile_fails_calls_and_not_the_start(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_text("{% if %}")
    with pytest.raises(TemplateError, match=r"chat_template\.jinja does not compile"):
        chat_template.load(tmp_path, TOKENS).render(USER)


def test_it_renders_as_transformers_does() -> None:
    rendering = pytest.importorskip("transformers.utils.chat_template_utils")
    source = (
        "{{- bos_token }}\n{%- for m in messages %}\n  {%- if m.role == 'user' %}\n"
        "    {{- '<|' + m.role + '|>\\n' + m.content | trim }}\n  {%- endif %}\n{%- endfor %}\n"
        "{{ {'x': [1, '<']} | tojson }}\n{% if add_generation_prompt %}\n<|assistant|>\n{% endif %}"
    )
    theirs, _ = rendering.render_jinja_template(
        [USER], chat_template=source, add_generation_prompt=True, bos_token="<s>"
    )
    assert render(source) == theirs[0]
