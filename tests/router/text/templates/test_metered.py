from collections.abc import Mapping
from typing import Any

import pytest
from tests.router.text.templates.bombs import BOMBS

from kagami_proto.errors import TemplateError
from kagami_router.text.templates.engine import Program
from kagami_router.text.templates.metered import (
    MAX_INLINE_SOURCE,
    MAX_PARTS,
    MAX_TEXT,
    METER,
    Meter,
    MeteredProgram,
    TooLong,
    weigh,
)


def run(source: str, seconds: float = 5, **variables: object) -> str:
    return MeteredProgram(source).run({**variables, METER: Meter(seconds)})


@pytest.mark.parametrize("name", BOMBS)
def test_what_is_not_surely_small_leaves_the_loop(name: str) -> None:
    with pytest.raises((TooLong, TemplateError)):  # some are faults before they are large
        run(BOMBS[name], seconds=0.01)


@pytest.mark.parametrize(
    ("source", "variables"),
    [
        ("{{ a }}", {"a": "x" * (MAX_TEXT + 1)}),
        ("", {"a": [[1] * 99] * 99}),
        ("", {"a": {str(n): n for n in range(MAX_PARTS)}}),
        ("x" * (MAX_INLINE_SOURCE + 1), {}),
    ],
)
def test_large_values_and_templates_leave_before_they_run(
    source: str, variables: Mapping[str, Any]
) -> None:
    with pytest.raises(TooLong):
        run(source, **variables)


SMALL = [
    "{{ 'a' ~ 1 ~ [1, 'b'] ~ {'c': 2} }}",
    "{{ [3, 1, 2] | sort | join(', ') }}{{ 'a b'.split() | map('upper') | list }}",
    "{% macro f(a, b=2) %}{{ a ~ b }}{{ varargs }}{{ kwargs }}{% endmacro %}{{ f(1, 2, 3, c=4) }}",
    "{% macro f() %}[{{ caller(1) }}]{% endmacro %}{% call(x) f() %}{{ x + 1 }}{% endcall %}",
    "{% for a, b in {'x': 1}.items() if b is eq(1) %}{{ loop.index ~ a ~ b }}{% endfor %}",
    "{% for a in [1, [2, [3]]] recursive %}{{ loop(a) if a is iterable else a }},{% endfor %}",
    "{% set ns = namespace(n=0) %}{% for a in l %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    "{% set a, b = 1, (2, 3) %}{{ a }}{{ b }}{{ 'abcdef'[1:4] }}{{ [1, 2, 3][::-1] }}",
    "{% set x %}a{{ 1 }}{% endset %}{{ x }}{% filter upper %}b{{ x }}{% endfilter %}",
    "{{ [{'a': 1}, {'a': 2}, {}] | selectattr('a', 'defined') | map(attribute='a') | list }}",
    "{{ {'a': ['é', none, true, 1.5]} | tojson(indent=2) }}{{ 'x' | center(9) }}",
    "{{ 'a' in 'abc' and 1 not in [2] and 1 < 2 < 3 }}{{ 7 % 4 }}{{ 2 ** 10 }}{{ 'ab' * 3 }}",
    "{{ none is none }}{{ dict(a=1) }}{{ dict.fromkeys('ab', 0) }}{{ '%Y' is string }}",
    "{% generation %}{{ 'x'.strip().replace('x', 'yy').startswith('y') }}{% endgeneration %}",
    "{% for a in range(5) %}{% if a == 3 %}{% break %}{% endif %}{{ a }}{% endfor %}",
    "{{ a is defined }}{{ a | default('b') }}{{ [[1, 2], [3]] | first | last }}{{ 'X' | lower }}",
]


@pytest.mark.parametrize("source", SMALL)
def test_what_is_small_runs_in_the_loop_as_everywhere(source: str) -> None:
    assert run(source) == Program(source).run({})


def test_a_template_cannot_reach_its_meter() -> None:
    assert run("{{ the }}{{ meter }}{% for a in [1] %}{{ a }}{% endfor %}") == "1"


def test_a_failure_that_nobody_asks_for_is_left_to_the_process() -> None:
    source = "{{ [1, 'x'] | map('abs') | first }}"
    assert Program(source).run({}) == "1"
    with pytest.raises(TooLong):
        run(source)


def test_parts_count_as_often_as_they_occur() -> None:
    value: list[Any] = [1]
    for _ in range(8):
        value = [value, value]
    assert weigh(value) > 2**8
    for _ in range(60):
        value = [value, value]
    with pytest.raises(TooLong):
        weigh(value)
