import pytest

from kagami_router.text.chat_template import ChatTemplate
from kagami_router.text.templates.content import ContentForm, content_form
from kagami_router.text.templates.engine import Program
from kagami_router.text.tokenizer import SpecialTokens

TEXT, EITHER, CHUNKS = ContentForm.TEXT, ContentForm.EITHER, ContentForm.CHUNKS
LOOP = "{% for m in messages %}…{% endfor %}"
PARTS = "{% for part in content %}{{ part.text }}{% endfor %}"


@pytest.mark.parametrize(
    ("body", "form"),
    [
        ("{{ m.content }}", TEXT),
        ("{{ '<' + m['content'] | trim }}", TEXT),
        ("{{ m.content.split('x')[0] }}{{ m.content[:3] }}{{ m.content[0] }}", TEXT),
        ("{% for line in m.content.split('a') %}{{ line }}{% endfor %}", TEXT),
        ("{% for call in m.tool_calls %}{{ call.text }}{% endfor %}", TEXT),
        ("{% if m.content is string %}{{ m.content }}{% endif %}", TEXT),
        ("{% for p in m.content %}{{ p.text }}{% endfor %}", CHUNKS),
        (
            "{% for p in m['content'] | selectattr('type', 'equalto', 'text') %}.{% endfor %}",
            CHUNKS,
        ),
        ("{{ m['content'][0]['text'] }}", CHUNKS),
        ("{{ messages[0].content[-1].text }}", CHUNKS),
        ("{% set content = m.content %}" + PARTS, CHUNKS),
        ("{% set c = m.content %}{% set content = c %}" + PARTS, CHUNKS),
        ("{% macro f(content) %}" + PARTS + "{% endmacro %}{{ f(m.content) }}", CHUNKS),
        ("{% if m.content is string %}.{% else %}{{ m.content[0].text }}{% endif %}", EITHER),
        (
            "{% macro f(content) %}{% if content is string %}.{% else %}" + PARTS + "{% endif %}"
            "{% endmacro %}{{ f(m.content) }}",
            EITHER,
        ),
    ],
)
def test_a_template_shows_the_form_of_content_that_it_reads(body: str, form: ContentForm) -> None:
    assert content_form(Program(LOOP.replace("…", body)).tree) is form


SENT = ["ab", [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]]


@pytest.mark.parametrize("content", SENT)
@pytest.mark.parametrize(
    "source",
    [
        "{{ '>' + messages[0].content }}",
        ">{% for part in messages[0].content %}{{ part.text }}{% endfor %}",
        ">{% if messages[0].content is string %}{{ messages[0].content }}{% else %}"
        "{% for part in messages[0].content %}{{ part['text'] }}{% endfor %}{% endif %}",
    ],
)
def test_both_forms_reach_every_template(source: str, content: object) -> None:
    template = ChatTemplate(source, SpecialTokens(None, None, {}))
    assert template.render([{"role": "user", "content": content}]) == ">ab"
