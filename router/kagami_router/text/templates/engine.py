"""Jinja as chat templates know it: `transformers`' environment, and a limit on what a run may do.

A template is a program that came with the model, and its messages came with a request. Neither may
hold up the server: every turn of a loop and every call of a macro is counted by a `Meter`, which
ends the run when it has gone on for too long, and text has a greatest length.
"""

import json
import time
from collections.abc import Callable, Mapping
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.parser
import jinja2.runtime
import jinja2.utils
from jinja2.sandbox import ImmutableSandboxedEnvironment

from kagami_proto.errors import TemplateError

# The clock is read once in so many turns: 50 us of an ordinary template, at worst some 50 ms
# (each turn may make a list of 100,000, the sandbox's limit of `range`).
_TURNS_A_LOOK = 16
# Characters of a prompt or of a text multiplied; ten times the longest body that is usual.
MAX_CHARACTERS = 20_000_000
# Of the numbers that ** may make: 9**9**9 would have 1.2 billion.
_MAX_BITS = 4096
# No name of a template's: it cannot read or replace its meter.
_METER = "the run's meter"
_COUNT = "_count_a_turn"

# What a template's faults look like in Python.
_FAULTS = (
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
    MemoryError,
)


class TooLong(Exception):
    """A run was ended by its meter."""


class Meter:
    """Ends a run with `TooLong`: some time after it was made, or when someone says so."""

    __slots__ = ("_deadline", "_is_stopped", "_left")

    def __init__(self, max_seconds: float) -> None:
        self._left = _TURNS_A_LOOK
        self._deadline = time.monotonic() + max_seconds
        self._is_stopped = False

    def stop(self) -> None:
        """Let the run end soon; from any thread."""
        self._is_stopped = True

    def count(self) -> None:
        """One more turn."""
        self._left -= 1
        if self._left < 0:
            self._look()

    def _look(self) -> None:
        if self._is_stopped or time.monotonic() > self._deadline:
            raise TooLong
        self._left = _TURNS_A_LOOK


class Program:
    """One compiled template."""

    def __init__(self, source: str) -> None:
        """Raises `TemplateError` if `source` does not compile."""
        environment = _Environment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationTag, jinja2.ext.loopcontrols],
        )
        try:
            self.tree = environment.parse(source)
            # The names it reads that it does not set: `tools`, `documents`, `enable_thinking`, …
            self.variables = frozenset(jinja2.meta.find_undeclared_variables(self.tree))
            self._template = environment.from_string(_metered(environment, source))
        except jinja2.TemplateError as error:
            raise TemplateError(_describe(error)) from error
        except _FAULTS as error:  # constants are computed while compiling
            raise TemplateError(
                f"{type(error).__name__}: {error}", field=f"{type(error).__name__}"
            ) from error
        self.source = source

    def run(self, variables: Mapping[str, Any], meter: Meter) -> str:
        """The text; raises `TemplateError` for what goes wrong, `TooLong` as the meter says."""
        pieces, size = [], 0
        try:
            for piece in self._template.generate({**variables, _METER: meter}):
                pieces.append(piece)
                size += len(piece)
                if size > MAX_CHARACTERS:
                    raise TemplateError(f"the prompt has more than {MAX_CHARACTERS} characters")
        except jinja2.TemplateError as error:
            raise TemplateError(_describe(error)) from error
        except _FAULTS as error:
            # A template is a program of the model's author: what it does wrong is no bug of ours.
            raise TemplateError(
                f"{type(error).__name__}: {error}", field=f"{type(error).__name__}"
            ) from error
        return "".join(pieces)


def _describe(error: jinja2.TemplateError) -> str:
    kind = {
        jinja2.TemplateSyntaxError: "syntax error",
        jinja2.UndefinedError: "undefined value",
    }.get(type(error))
    return f"{kind}: {error.message}" if kind else str(error.message or error)


def _metered(environment: jinja2.Environment, source: str) -> jinja2.nodes.Template:
    """Begin the body of every loop and macro with a call of the meter.

    A filter is called without the detour through the sandbox that a function takes: 0.2 us.
    """
    tree = environment.parse(source)
    loops = [node.body for node in tree.find_all(jinja2.nodes.For)]
    macros = [node.body for node in tree.find_all(jinja2.nodes.Macro)]
    for body in (*loops, *macros):
        nothing = jinja2.nodes.Const(None)
        count = jinja2.nodes.Filter(nothing, _COUNT, [], [], None, None)
        body.insert(0, jinja2.nodes.ExprStmt(count).set_lineno(tree.lineno))
    tree.set_environment(environment)
    return tree


@jinja2.pass_context
def _count(context: jinja2.runtime.Context, _: None) -> None:
    meter: Meter = context.parent[_METER]
    meter.count()


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}` marks what a training script learns from; here its body is just text."""

    tags = {"generation"}  # noqa: RUF012 - declared by jinja2

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        """A call block, as in `transformers`: what is set inside stays inside."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_text_of")
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _text_of(self, caller: Callable[[], str]) -> str:
        return caller()


class _Environment(ImmutableSandboxedEnvironment):
    """`transformers`' environment, from its `_compile_jinja_template`: prompts match training."""

    intercepted_binops = frozenset(("*", "**"))

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.filters["tojson"] = to_json
        self.filters[_COUNT] = _count
        self.tests["none"] = is_none
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now
        self.globals["dict"] = _Dict()
        self.globals["namespace"] = _Namespace

    def call_binop(
        self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any
    ) -> Any:
        """Multiply, unless that makes more than a server can hold."""
        if operator == "*":
            _check_product(left, right)
            _check_product(right, left)
        elif isinstance(left, int) and isinstance(right, int):
            if left.bit_length() * right > _MAX_BITS:
                raise jinja2.TemplateRuntimeError(f"a power of more than {_MAX_BITS} bits")
        return super().call_binop(context, operator, left, right)


def _check_product(value: object, times: object) -> None:
    if not isinstance(times, int):
        return
    if isinstance(value, str | list | tuple) and len(value) * times > MAX_CHARACTERS:
        raise jinja2.TemplateRuntimeError(f"a product of more than {MAX_CHARACTERS} parts")


class _Dict:
    """`dict` without the type's own attributes."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        """`dict.fromkeys`."""
        return dict.fromkeys(*args)


class _Namespace(jinja2.utils.Namespace):
    """`namespace()`, which keeps no name that begins with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args
        given = dict(*rest, **kwargs)
        for name in given:
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, given)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: object) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace cannot hold {name!r}")


class NoContent(str):
    """The content of a message without one, for all that templates do with it.

    Most put it between other texts, where None raises or prints "None"; some (DeepSeek's) ask
    whether it `is none` to find the turns of tool calls. It is an empty text, and it `is none`.
    """

    __slots__ = ()


def is_none(value: object) -> bool:
    """Jinja's test `none`."""
    return value is None or isinstance(value, NoContent)


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As Python writes it: nothing escaped for HTML."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)
