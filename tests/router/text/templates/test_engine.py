import pytest
from jinja2.defaults import DEFAULT_FILTERS as FILTERS

from kagami_proto.errors import TemplateError
from kagami_router.text.templates import engine
from kagami_router.text.templates.engine import MAX_SOURCE, Program

RECURSIVE = "{% for a in [[1] * 9] * 9 recursive %}{{ loop([a] * 99) }}{% endfor %}"


def run(source: str, **variables: object) -> str:
    return Program(source).run(variables)


def test_endless_recursion_is_the_templates_fault() -> None:
    with pytest.raises(TemplateError, match="RecursionError"):
        run(RECURSIVE)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("{{ 'x' * 10**9 }}", "product of more than"),
        ("{{ 10**9 * [1] }}", "product of more than"),
        ("{{ 9 ** (9 ** 9) }}", "power of more than"),
        ("{{ 'x' * n }}", "product of more than"),
    ],
)
def test_what_would_fill_the_memory_is_refused(source: str, text: str) -> None:
    with pytest.raises(TemplateError, match=text):
        run(source, n=10**9)


def test_small_products_and_powers_are_computed() -> None:
    assert run("{{ '-' * 3 }}{{ [0] * 2 }}{{ 2 ** 10 }}{{ 2 * 3 }}") == "---[0, 0]10246"


def test_the_prompt_has_a_greatest_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "MAX_CHARACTERS", 100)
    with pytest.raises(TemplateError, match="more than 100 characters"):
        run("{% for a in range(11) %}{{ '0123456789' }}{% endfor %}")


@pytest.mark.parametrize(
    "source",
    [
        "{{ namespace(_x=1) }}",
        "{% set ns = namespace() %}{% set ns._x = 1 %}",
        "{{ dict.__class__ }}{{ dict.mro() }}",
        "{{ messages.__class__.__base__.__subclasses__() }}",
        "{{ self._TemplateReference__context.parent }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{% include 'x' %}",
        "{{ ''.encode('no such') }}",
    ],
)
def test_a_template_stays_in_its_sandbox(source: str) -> None:
    with pytest.raises(TemplateError):
        run(source, messages=[])


def test_a_namespace_and_a_dict_are_as_ever() -> None:
    source = (
        "{% set ns = namespace({'a': 1}, self=2) %}{% set ns.b = 3 %}"
        "{{ ns.a }}{{ ns.self }}{{ ns.b }}{{ dict(x=4).x }}{{ dict.fromkeys('y', 5).y }}"
    )
    assert run(source) == "12345"


def test_what_is_set_in_a_generation_block_stays_there() -> None:
    source = "{% set a = 1 %}{% generation %}{% set a = 2 %}{{ a }}{% endgeneration %}{{ a }}"
    assert run(source) == "21"


def test_the_variables_a_template_reads_are_known() -> None:
    assert {"tools", "x"} <= Program("{% if tools %}{% set y = x %}{{ y }}{% endif %}").variables


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'x' | center(10000000000) }}",
        "{{ '%10000000000d' | format(1) }}",
        "{{ 'x'.ljust(10000000000) }}",
        "{% set x = 'x' | center(10000000000) %}",
        "{% if 'x' | center(10000000000) %}{% endif %}",
        "{% for a in 'x' | center(10000000000) %}{% endfor %}",
        "{{ {'a': 'x' | center(10000000000)} ~ 'x' }}",
    ],
)
def test_compiling_computes_nothing(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[str] = []
    for name in ("center", "format"):
        monkeypatch.setitem(FILTERS, name, lambda *_: computed.append("x"))
    Program(source)
    assert not computed


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("x" * (MAX_SOURCE + 1), f"characters, more than {MAX_SOURCE}"),
        ("{% for a in b %}" * 30 + "{% endfor %}" * 30, "SyntaxError"),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "RecursionError"),
        ("{{ " + "[" * 250 + "1" + "]" * 250 + " }}", "Recursion"),
    ],
)
def test_what_does_not_compile_is_an_error_of_the_template(source: str, text: str) -> None:
    with pytest.raises(TemplateError, match=text):
        Program(source)
