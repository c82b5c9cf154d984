"""Runs a template in the event loop, as long as all that it does is surely small.

Every value that a run makes is weighed: characters, and parts of lists and tables. Operations that
are known to cost no more than what they are given, or what is checked before, are in the tables
below. All that is larger or unknown ends the run with `TooLong`; then the rendering process does
it. So nothing here has to be complete: what is missing costs a fraction of a millisecond.

Costs 0.2 us for each call, filter and comparison.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import jinja2
import jinja2.nodes
import jinja2.runtime
from jinja2.sandbox import safe_range
from jinja2.utils import Namespace as JinjaNamespace

from kagami_router.text.templates.engine import (
    DictMaker,
    Environment,
    GenerationTag,
    Namespace,
    Program,
    raise_exception,
    strftime_now,
)
from kagami_router.text.templates.values import Arguments

# The clock is read once in so many operations; each takes some 100 us at worst.
_OPERATIONS_PER_CHECK = 16
# The largest value: characters, and parts. A value's parts are counted as often as they occur.
MAX_TEXT = 65_536
MAX_PARTS = 4096
# The text of a whole run, and of what is written into variables.
_MAX_WRITTEN = 16 * MAX_TEXT
# What an operation may make of a value and its arguments, whose sizes multiply at worst.
_MAX_PRODUCT = 2**20
_MAX_BITS = 4096
# Larger templates have room for too much between two looks at the clock.
MAX_INLINE_SOURCE = 100_000
# Not valid names in a template: a template can neither read nor replace its meter.
METER = "the run's meter"
_COUNT, _WEIGH, _TICK = "_count_iteration", "_weigh", "_tick"

# Filters whose result is a part of what they get, a number, or a text of about the same length.
_PLAIN_FILTERS = (
    "abs attr capitalize count d default e escape first float int last length lower max min safe"
    " string trim upper"
).split()
# Filters whose result is weighed after, and whose arguments are measured before.
_WEIGHED_FILTERS = (
    "center dictsort indent items join list map reject rejectattr replace reverse select selectattr"
    " sort tojson truncate unique"
).split()
# They are generators: made at once here.
_LAZY_FILTERS = frozenset(("map", "reject", "rejectattr", "select", "selectattr", "unique"))
_METHODS: Mapping[type, frozenset[str]] = {
    str: frozenset(
        (
            "capitalize center count endswith find index isalnum isalpha isdecimal isdigit islower"
            " isnumeric isspace istitle isupper join ljust lower lstrip partition removeprefix"
            " removesuffix replace rfind rindex rjust rpartition rsplit rstrip split splitlines"
            " startswith strip swapcase title upper zfill"
        ).split()
    ),
    dict: frozenset(("get", "items", "keys", "values")),
    list: frozenset(("count", "index")),
    tuple: frozenset(("count", "index")),
}
_MAKERS = (DictMaker, jinja2.runtime.Macro, jinja2.runtime.LoopContext)
_FUNCTIONS = (safe_range, Namespace, raise_exception)
_OWNERS = (jinja2.runtime.LoopContext, GenerationTag)
_NUMBERS = (int, float)
# Lists, and the views of a table.
_LISTS: tuple[type, ...] = (list, tuple, type({}.keys()), type({}.values()), type({}.items()))


class TooLong(Exception):
    """The run is not surely small, or its time is up."""


class Meter:
    """Ends a run with `TooLong`, at the latest `max_seconds` after the meter was made."""

    __slots__ = ("_deadline", "_left", "_written")

    def __init__(self, max_seconds: float) -> None:
        self._left = _OPERATIONS_PER_CHECK
        self._written = 0
        self._deadline = time.monotonic() + max_seconds

    def count(self, num_characters: int = 0) -> None:
        """Count one operation, and what it writes."""
        self._left -= 1
        self._written += num_characters
        if self._left < 0 or self._written > _MAX_WRITTEN:
            self._check()

    def _check(self) -> None:
        if self._written > _MAX_WRITTEN or time.monotonic() > self._deadline:
            raise TooLong
        self._left = _OPERATIONS_PER_CHECK


def weigh(value: object) -> int:
    """The size of a value with all its parts; raises `TooLong` where it is not small."""
    if isinstance(value, str):
        if len(value) > MAX_TEXT:
            raise TooLong
        return len(value) + 1
    parts, text = 0, 0
    left = [value]
    while left:
        value = left.pop()
        parts += 1
        if isinstance(value, str):
            text += len(value)
        elif isinstance(value, dict):
            left += value.keys()
            left += value.values()
            text += len(str(value)) if isinstance(value, Arguments) else 0
        elif isinstance(value, _LISTS):
            left += cast("Iterable[object]", value)
        elif isinstance(value, int):
            text += value.bit_length() // 3
        elif isinstance(value, range):
            parts += len(value)
        elif isinstance(value, JinjaNamespace):
            left.append(value._Namespace__attrs)
        elif isinstance(value, _UNKNOWN):
            raise TooLong
        if parts + len(left) > MAX_PARTS or text > MAX_TEXT:
            raise TooLong
    return parts + text


# Whatever may have parts that cannot be counted without taking them.
_UNKNOWN = (type(_ for _ in ()), map, filter, zip, set, frozenset, bytes, bytearray)


class MeteredEnvironment(Environment):
    """The environment with a meter at every operation that could be large."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        super().__init__()
        plain = Environment()
        for name in self.filters:
            self.filters[name] = _leaves
        for name in _PLAIN_FILTERS:
            self.filters[name] = _plain(plain, name)
        for name in _WEIGHED_FILTERS:
            self.filters[name] = _weighed(plain, name)
        self.filters |= {_COUNT: _count, _WEIGH: _weigh_value, _TICK: _tick}
        self.finalize = _written

    def prepared(self, source: str) -> jinja2.nodes.Template:
        """The tree, with the meter's filters around what is metered."""
        tree = _Metering().visit(super().prepared(source))
        tree.set_environment(self)
        assert isinstance(tree, jinja2.nodes.Template)
        return tree

    def call(self, context: jinja2.runtime.Context, called: Any, *args: Any, **kwargs: Any) -> Any:
        """Every call of a template; raises `TooLong` for what is not in the tables."""
        _meter(context).count()
        _check_call(called, args, kwargs)
        result = super().call(context, called, *args, **kwargs)
        if not isinstance(called, jinja2.runtime.Macro):
            weigh(result)
        return result

    def call_binop(
        self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any
    ) -> Any:
        """`+`, `*`, `**` and `%`; numbers are bounded, and what has parts is weighed."""
        _meter(context).count()
        if isinstance(left, _NUMBERS) and isinstance(right, _NUMBERS):
            if operator == "*" and isinstance(left, int) and isinstance(right, int):
                if left.bit_length() + right.bit_length() > _MAX_BITS:
                    raise TooLong
        elif operator == "*":
            _check_product(weigh(left), weigh(right) + _magnitude(left) + _magnitude(right))
        elif operator == "%" and isinstance(left, str):
            raise TooLong  # `'%1000000000d' % 1`
        result = super().call_binop(context, operator, left, right)
        weigh(result)
        return result


def _check_call(called: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    if isinstance(called, jinja2.runtime.Macro):
        # Its arguments are there already; a tuple or a table of them would be new.
        if called.catch_varargs or called.catch_kwargs:
            weigh((args, kwargs))
        return
    owner = getattr(called, "__self__", None)
    for kind, names in _METHODS.items():
        if isinstance(owner, kind):
            if getattr(called, "__name__", "") not in names:
                raise TooLong
            if args and isinstance(owner, str):
                _check_product(weigh(owner), _size(args, kwargs))
            return
    if called is strftime_now:
        if not (len(args) == 1 and isinstance(args[0], str) and _is_plain_form(args[0])):
            raise TooLong
    elif isinstance(called, _MAKERS) or called in _FUNCTIONS or isinstance(owner, _OWNERS):
        weigh((args, kwargs))
    elif isinstance(owner, DictMaker):
        _check_product(*(weigh(one) for one in (*args, None, None)[:2]))
    else:
        raise TooLong


def _is_plain_form(form: str) -> bool:
    """Whether a form of dates has no widths: `%1000000000d`."""
    return len(form) < 100 and not any(sign.isdigit() for sign in form)


def _size(args: Sequence[Any], kwargs: Mapping[str, Any]) -> int:
    """What arguments may multiply a value by: their weight, and their numbers."""
    values = (*args, *kwargs.values())
    return sum(weigh(value) + _magnitude(value) for value in values)


def _magnitude(value: object) -> int:
    return abs(value) if isinstance(value, int) else 0


def _check_product(value: int, times: int) -> None:
    if value * times > _MAX_PRODUCT:
        raise TooLong


def _meter(context: jinja2.runtime.Context) -> Meter:
    meter: Meter = context.parent[METER]
    return meter


@jinja2.pass_context
def _count(context: jinja2.runtime.Context, num_characters: int) -> None:
    _meter(context).count(num_characters)


@jinja2.pass_context
def _tick(context: jinja2.runtime.Context, value: Any) -> Any:
    _meter(context).count()
    return value


@jinja2.pass_context
def _weigh_value(context: jinja2.runtime.Context, value: Any) -> Any:
    _meter(context).count()
    weigh(value)
    return value


@jinja2.pass_context
def _written(context: jinja2.runtime.Context, value: Any) -> Any:
    _meter(context).count(weigh(value))
    return value


@jinja2.pass_context
def _leaves(context: jinja2.runtime.Context, *args: Any, **kwargs: Any) -> Any:
    raise TooLong


def _plain(plain: Environment, name: str) -> Callable[..., Any]:
    @jinja2.pass_context
    def run(context: jinja2.runtime.Context, value: Any, *args: Any, **kwargs: Any) -> Any:
        _meter(context).count()
        result = plain.call_filter(
            name, value, args, kwargs, context=context, eval_ctx=context.eval_ctx
        )
        if isinstance(result, str):
            weigh(result)
        return result

    return run


def _weighed(plain: Environment, name: str) -> Callable[..., Any]:
    @jinja2.pass_context
    def run(context: jinja2.runtime.Context, value: Any, *args: Any, **kwargs: Any) -> Any:
        _meter(context).count()
        size = weigh(value)
        if args or kwargs:
            _check_product(size, _size(args, kwargs))
        result = plain.call_filter(
            name, value, args, kwargs, context=context, eval_ctx=context.eval_ctx
        )
        if name not in _LAZY_FILTERS:
            weigh(result)
            return result
        try:
            made = list(result)
        except Exception as error:
            # It is no failure if the template never takes this part: the process knows.
            raise TooLong from error
        weigh(made)
        return iter(made)

    return run


class _Metering:
    """Puts the meter's filters into a tree."""

    def visit(self, node: jinja2.nodes.Node) -> jinja2.nodes.Node:
        """The node to stand in its place; its parts are done first."""
        for name, value in node.iter_fields():
            if isinstance(value, list):
                done = [self._visited(one) for one in value]
                setattr(node, name, done)
            else:
                setattr(node, name, self._visited(value))
        if isinstance(node, jinja2.nodes.For | jinja2.nodes.Macro | jinja2.nodes.CallBlock):
            node.body.insert(0, _counting(node))
        return _around(node)

    def _visited(self, value: Any) -> Any:
        if isinstance(value, tuple):  # a `with` in older trees
            return tuple(self._visited(one) for one in value)
        return self.visit(value) if isinstance(value, jinja2.nodes.Node) else value


def _counting(node: Any) -> jinja2.nodes.Node:
    data = [part.data for part in node.find_all(jinja2.nodes.TemplateData)]
    size = jinja2.nodes.Const(sum(map(len, data)), lineno=node.lineno)
    return jinja2.nodes.ExprStmt(_filter(_COUNT, size), lineno=node.lineno)


def _around(node: jinja2.nodes.Node) -> jinja2.nodes.Node:
    if isinstance(node, jinja2.nodes.List | jinja2.nodes.Tuple | jinja2.nodes.Dict):
        is_value = getattr(node, "ctx", "load") == "load"
        parts = [part for part in node.iter_child_nodes() if not _is_constant(part)]
        return _filter(_WEIGH, node) if is_value and parts else node
    if isinstance(node, jinja2.nodes.Concat):
        return _filter(_WEIGH, node)
    if isinstance(node, jinja2.nodes.Compare):
        return _filter(_TICK, node)
    if isinstance(node, jinja2.nodes.Test) and (node.args or node.kwargs):
        return _filter(_TICK, node)
    if isinstance(node, jinja2.nodes.Getitem) and isinstance(node.arg, jinja2.nodes.Slice):
        return _filter(_TICK, node)
    if isinstance(node, jinja2.nodes.For) and node.test is not None:
        # What its `if` leaves out is not counted in its body.
        node.test = _filter(_TICK, node.test)
    return node


def _is_constant(node: jinja2.nodes.Node) -> bool:
    if isinstance(node, jinja2.nodes.Pair):
        return _is_constant(node.key) and _is_constant(node.value)
    return isinstance(node, jinja2.nodes.Const)


def _filter(name: str, node: Any) -> jinja2.nodes.Filter:
    return jinja2.nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


class MeteredProgram(Program):
    """A program that runs in the event loop."""

    def __init__(self, source: str) -> None:
        super().__init__(source, MeteredEnvironment())

    def run(self, variables: Mapping[str, Any]) -> str:
        """The text; raises `TemplateError`, and `TooLong` where it is not surely small."""
        if len(self.source) > MAX_INLINE_SOURCE:
            raise TooLong
        weigh(variables)
        return super().run(variables)
