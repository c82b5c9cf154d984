"""Jinja for chat templates: the environment of `transformers`, and limits on a run.

A template is a program that comes with the model, and its messages come with a request. Neither may
block the server. A `Meter` counts every iteration of a loop and every call of a macro, and ends the
run when it takes too long. The length of text is limited too.
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

# The clock is read once in so many iterations: 50 us of a normal template, at worst some 50 ms
# (each iteration may make a list of 100,000, the sandbox's limit of `range`).
_ITERATIONS_PER_CHECK = 16
# The longest prompt, and the longest result of `*`, in characters: ten times the usual limit of a
# body.
MAX_CHARACTERS = 20_000_000
# The longest result of `**`: 9**9**9 would have 1.2 billion bits.
_MAX_BITS = 4096
# Not a valid name in a template: a template can neither read nor replace its meter.
_METER = "the run's meter"
_COUNT = "_count_iteration"

# The Python errors that a faulty template raises.
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
    """Ends a run with `TooLong`: `max_seconds` after the meter was made, or after `stop`."""

    __slots__ = ("_deadline", "_is_stopped", "_left")

    def __init__(self, max_seconds: float) -> None:
        self._left = _ITERATIONS_PER_CHECK
        self._deadline = time.monotonic() + max_seconds
        self._is_stopped = False

    def stop(self) -> None:
        """End the run soon; may be called from any thread."""
        self._is_stopped = True

    def count(self) -> None:
        """Count one iteration; raises `TooLong`."""
        self._left -= 1
        if self._left < 0:
            self._check()

    def _check(self) -> None:
        if self._is_stopped or time.monotonic() > self._deadline:
            raise TooLong
        self._left = _ITERATIONS_PER_CHECK


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
            # Names that it reads and does not set: `tools`, `documents`, `enable_thinking`, …
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
        """The text; raises `TemplateError` if the template fails, `TooLong` when time is up."""
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
            # The model's author wrote the template: its errors are not bugs of this server.
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
    """Insert a call of the meter at the start of the body of every loop and macro.

    The call is a filter: filters, unlike functions, do not pass through the sandbox (0.2 us).
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
    """`{% generation %}` marks text for training scripts; here its body is ordinary text."""

    tags = {"generation"}  # noqa: RUF012 - declared by jinja2

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        """A call block, as in `transformers`: variables set inside are local to it."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_text_of")
        return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _text_of(self, caller: Callable[[], str]) -> str:
        return caller()


class _Environment(ImmutableSandboxedEnvironment):
    """The environment of `transformers` (`_compile_jinja_template`): prompts match training."""

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
        """`*` and `**`; raises if the result would be too large."""
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
    """`dict` for templates, without the other attributes of the type."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        """As `dict.fromkeys`."""
        return dict.fromkeys(*args)


class _Namespace(jinja2.utils.Namespace):
    """`namespace()`; it refuses names that begin with an underscore."""

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
    """The content of a message without content: an empty text that also `is none`.

    Most templates concatenate the content with texts, where None raises or prints "None". Some
    (DeepSeek's) ask whether it `is none` to find the messages with tool calls.
    """

    __slots__ = ()


def is_none(value: object) -> bool:
    """Jinja's test `none`; true for `NoContent` too."""
    return value is None or isinstance(value, NoContent)


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as Python writes it; nothing is escaped for HTML, as in `transformers`."""
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
