"""Several and late system messages, with templates that take one, and with those that take all."""

from pathlib import Path

import pytest
from tests.fakes.fake_server import TEMPLATE, TOKENS

from kagami_proto.errors import TemplateError
from kagami_router.text.chat_template import ChatTemplate, load

# The kinds that published templates are of.
REFUSES_LATE = (
    "{% for m in messages %}{% if m.role == 'system' and not loop.first %}"
    "{{ raise_exception('System message must be at the beginning.') }}{% endif %}"
    "<|{{ m.role }}|>{{ m.content }}\n{% endfor %}"
)
LEAVES_OUT_LATE = (
    "{% if messages[0].role == 'system' %}<|system|>{{ messages[0].content }}\n{% endif %}"
    "{% for m in messages if m.role != 'system' %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}"
)
KEEPS_THE_LAST = (
    "{% set ns = namespace(system='') %}{% for m in messages if m.role == 'system' %}"
    "{% set ns.system = m.content %}{% endfor %}"
    "{% if ns.system %}<|system|>{{ ns.system }}\n{% endif %}"
    "{% for m in messages if m.role != 'system' %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}"
)
ALTERNATES = (
    "{% if messages[0].role == 'system' %}{% set rest = messages[1:] %}"
    "<|system|>{{ messages[0].content }}\n{% else %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "<|{{ m.role }}|>{{ m.content }}\n{% endfor %}"
)
TAKE_ONE = [REFUSES_LATE, LEAVES_OUT_LATE, KEEPS_THE_LAST, ALTERNATES]
FAMILIES = sorted((Path(__file__).parent / "templates" / "families").iterdir())
# Not even a first one: said as TGI says it.
TAKE_NONE = ("gemma_2", "mistral_v1")
ROLES = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}


async def prompt(source: str, roles: str, template: ChatTemplate | None = None) -> str:
    """The prompt of messages that have these roles, and their number as their text."""
    messages = [
        {"role": ROLES[role], "content": f"{role}{number}"} for number, role in enumerate(roles)
    ]
    return await (template or ChatTemplate(source, TOKENS)).prompt(messages)


@pytest.mark.parametrize("source", TAKE_ONE)
@pytest.mark.parametrize(
    ("roles", "expected"),
    [
        ("su", "<|system|>s0|<|user|>u1|"),
        ("ssu", "<|system|>s0||s1|<|user|>u2|"),
        ("sssu", "<|system|>s0||s1||s2|<|user|>u3|"),
        ("us", "<|user|>u0||s1|"),
        ("uss", "<|user|>u0||s1||s2|"),
        ("usau", "<|user|>u0||s1|<|assistant|>a2|<|user|>u3|"),
        ("suasu", "<|system|>s0|<|user|>u1|<|assistant|>a2|<|user|>s3||u4|"),
        ("uassu", "<|user|>u0|<|assistant|>a1|<|user|>s2||s3||u4|"),
        ("suas", "<|system|>s0|<|user|>u1|<|assistant|>a2|<|user|>s3|"),
        ("ssuasa", "<|system|>s0||s1|<|user|>u2|<|assistant|>a3|<|user|>s4|<|assistant|>a5"),
    ],
)
async def test_a_template_that_takes_one_gets_one_first(
    source: str, roles: str, expected: str
) -> None:
    assert (await prompt(source, roles)).replace("\n", "|") == expected


@pytest.mark.parametrize("roles", ["su", "ssu", "us", "suasu", "uassu", "suas", "usu"])
async def test_a_template_that_takes_them_gets_them_as_sent(roles: str) -> None:
    template = ChatTemplate(TEMPLATE, TOKENS)
    messages = [{"role": ROLES[role], "content": role} for role in roles]
    assert await prompt(TEMPLATE, roles) == template.render(
        [one | {"content": f"{one['content']}{at}"} for at, one in enumerate(messages)]
    )


async def test_a_system_message_behind_a_result_is_the_users() -> None:
    text = await prompt(REFUSES_LATE, "sutsa")
    assert text.startswith("<|system|>s0\n<|user|>u1\n<|tool|>t2\n<|user|>s3\n<|assistant|>a4")


async def test_what_stands_before_a_late_one_stays_as_it_was() -> None:
    before = await prompt(LEAVES_OUT_LATE, "sua")
    assert (await prompt(LEAVES_OUT_LATE, "suasu")).startswith(before)


async def test_chunks_are_joined_and_other_members_stay() -> None:
    source = "{% for m in messages %}" + REFUSES_LATE.removeprefix("{% for m in messages %}")
    source = source.replace("{{ m.content }}", "{{ m.content }}{{ m.name }}")
    chunks = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [
        {"role": "user", "name": "Ann", "content": chunks},
        {"role": "system", "content": chunks},
    ]
    assert await ChatTemplate(source, TOKENS).prompt(messages) == "<|user|>ab\n\nabAnn\n"


async def test_a_template_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    template = ChatTemplate(REFUSES_LATE, TOKENS)
    jobs = []
    inline = ChatTemplate._inline
    monkeypatch.setattr(
        ChatTemplate, "_inline", lambda self, job: jobs.append(job) or inline(self, job)
    )
    await prompt("", "su", template)
    assert len(jobs) == 1
    for _ in range(3):
        await prompt("", "ssu", template)
    assert len(jobs) == 1 + 2 + 3


@pytest.mark.parametrize("folder", FAMILIES, ids=lambda folder: folder.name)
@pytest.mark.parametrize("roles", ["ssu", "us", "suasu", "uassu", "suas"])
async def test_each_family_shows_all_that_was_said(folder: Path, roles: str) -> None:
    template = load(folder, TOKENS)
    assert isinstance(template, ChatTemplate)
    try:
        if folder.name in TAKE_NONE and roles.startswith("s"):
            with pytest.raises(TemplateError):
                await prompt("", roles, template)
        else:
            shown = await prompt("", roles, template)
            assert all(f"{role}{number}" in shown for number, role in enumerate(roles))
    finally:
        template.close()
