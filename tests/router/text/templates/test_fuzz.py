"""Template fragments from a grammar: each run ends, is bounded, and is what plain jinja2 makes."""

import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kagami_proto.errors import TemplateError
from kagami_router.text.templates import worker
from kagami_router.text.templates.engine import MAX_CHARACTERS
from kagami_router.text.templates.metered import METER, Meter, MeteredProgram, TooLong
from kagami_router.text.templates.process import RenderProcess
from kagami_router.text.templates.prompt import Job

VARIABLES = {"s": "a <é>\nb", "n": 7, "l": [3, "x", [1]], "d": {"k": "v", "l": [1, 2]}}
NUMBER = st.sampled_from(("0", "2", "-1", "17", "99999", "10000000000", "n"))
TEXT = st.sampled_from(("'x'", "s", "''", "'%9d'", "'{:9}'", "'ab' * 3"))
LEAF = NUMBER | TEXT | st.sampled_from(("l", "d", "none", "true", "u", "d.k", "ns.x", "range(9)"))
FILTERS = (
    "trim length list first last join(',') tojson tojson(indent=2) sort reverse upper string sum"
    " map('string')|list map('abs')|sum select('string')|list batch(3)|list slice(2)|list center(9)"
    " center(999999999) replace('x','yy') indent(3) items|list dictsort unique|list default('q')"
    " batch(999999999,0)|list format(1) round(2) wordcount truncate(3) int groupby(0)|list"
).split()
METHODS = (
    "strip() split() upper() replace('a','bb') center(40) zfill(9) join('ab') startswith('a')"
    " items()|list get('k') format(1) ljust(99999999999) splitlines() count('a') nothing()"
).split()


def grown(part: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.one_of(
        st.tuples(part, st.sampled_from("+ ~ * % - // == < in and or".split()), part).map(
            lambda given: f"({given[0]} {given[1]} {given[2]})"
        ),
        st.tuples(part, st.sampled_from(FILTERS)).map(lambda given: f"({given[0]})|{given[1]}"),
        st.tuples(part, st.sampled_from(METHODS)).map(lambda given: f"({given[0]}).{given[1]}"),
        st.tuples(part, part).map(lambda given: f"[{given[0]}, {given[1]}]"),
        st.tuples(part, part).map(lambda given: f"{{'a': {given[0]}, 'b': {given[1]}}}"),
        part.map(lambda one: f"({one})[0:2]"),
    )


EXPRESSION = st.recursive(LEAF, grown, max_leaves=5)


def blocks(part: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.one_of(
        st.tuples(EXPRESSION, part).map(
            lambda given: f"{{% for i in {given[0]} %}}{given[1]}{{% endfor %}}"
        ),
        st.tuples(EXPRESSION, part).map(
            lambda given: f"{{% if {given[0]} %}}{given[1]}{{% else %}}-{{% endif %}}"
        ),
        st.tuples(EXPRESSION, part).map(lambda given: f"{{% set ns.x = {given[0]} %}}{given[1]}"),
        part.map(lambda one: f"{{% set ns.x %}}{one}{{% endset %}}"),
        part.map(lambda one: f"{{% macro f(a=1) %}}{one}{{% endmacro %}}{{{{ f() }}}}"),
        st.tuples(part, part).map("".join),
    )


TEMPLATE = st.recursive(EXPRESSION.map(lambda one: f"{{{{ {one} }}}}"), blocks, max_leaves=5).map(
    lambda body: f"{{% set ns = namespace(x='x') %}}{body}"
)


def inline(source: str) -> str | None:
    """What the loop makes of it; None: it leaves, or the template has a fault."""
    started = time.monotonic()
    try:
        return MeteredProgram(source).run({**VARIABLES, METER: Meter(0.02)})
    except (TooLong, TemplateError):
        return None
    finally:
        assert time.monotonic() - started < 2  # generous: some milliseconds


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(source=TEMPLATE)
def test_a_run_in_the_loop_ends_and_is_what_the_process_makes(source: str) -> None:
    made = inline(source)
    if made is not None:
        assert len(made) <= MAX_CHARACTERS
        assert made == plain(source)


@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@given(source=TEMPLATE)
def test_a_process_ends_every_run(source: str) -> None:
    process = RenderProcess({"a": source})
    try:
        text = process.prompt(Job("a", [{"role": "user"}], VARIABLES, None, None), 1)
        assert len(text) <= MAX_CHARACTERS
    except TemplateError:
        pass
    finally:
        process.close()


def plain(source: str) -> str:
    """As `transformers` renders it; only for what was small in the loop."""
    import_utils = pytest.importorskip("transformers.utils.chat_template_utils")
    text: str = import_utils._compile_jinja_template(source).render(**VARIABLES)
    return text


def test_the_limits_of_the_process_are_those_of_a_prompt() -> None:
    assert 16 * MAX_CHARACTERS < worker.MAX_MEMORY
