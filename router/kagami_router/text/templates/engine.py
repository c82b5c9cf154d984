"""Jinja for chat templates: the environment of `transformers`, and errors that a client may read.

A template is a program that comes with the model, and its messages come with a request. Neither may
block the server: in the event loop a template runs metered (metered.py), else in a process with
limits of its own (worker.py).
"""

import json
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
from kagami_router.text.templates.values import NoContent

# The longest prompt, and the longest result of `*`, in characters: ten times the usual limit of a
# body.
MAX_CHARACTERS = 20_000_000
# The longest result of `**`: 9**9**9 would have 1.2 billion bits.
_MAX_BITS = 4096
# The longest template, in characters: real ones have up to 30,000.
MAX_SOURCE = 500_000

# The Python errors that a faulty template raises.
_FAULTS = (
    TypeError,
    ValueError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
    MemoryError,
    SyntaxError,  # Python's own limits: 20 nested blocks, 100 nested brackets
)


class Program:
    """One compiled template."""

    def __init__(self, source: str, environment: "Environment | None" = None) -> None:
        """Raises `TemplateError` if `source` does not compile."""
        environment = environment or Environment()
        if len(source) > MAX_SOURCE:
            raise TemplateError(
                f"the template has {len(source)} characters, more than {MAX_SOURCE}"
            )
        try:
            self.tree = environment.parse(source)
            # Names that it reads and does not set: `tools`, `documents`, `enable_thinking`, …
            self.variables = _read_variables(self.tree, environment)
            self._template = environment.from_string(environment.prepared(source))
        except jinja2.TemplateError as error:
            raise TemplateError(_describe(error)) from error
        except _FAULTS as error:
            raise TemplateError(
                f"{type(error).__name__}: {error}", field=f"{type(error).__name__}"
            ) from error
        self.source = source

    def run(self, variables: Mapping[str, Any]) -> str:
        """The text; raises `TemplateError` if the template fails."""
        pieces, size = [], 0
        try:
            for piece in self._template.generate(variables):
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


def _read_variables(tree: jinja2.nodes.Template, environment: "Environment") -> frozenset[str]:
    """As `jinja2.meta.find_undeclared_variables`, which computes constants."""
    tracker = jinja2.meta.TrackingCodeGenerator(environment)
    tracker.optimizer = None
    tracker.visit(tree)
    return frozenset(tracker.undeclared_identifiers)


def _describe(error: jinja2.TemplateError) -> str:
    kind = {
        jinja2.TemplateSyntaxError: "syntax error",
        jinja2.UndefinedError: "undefined value",
    }.get(type(error))
    return f"{kind}: {error.message}" if kind else str(error.message or error)


class GenerationTag(jinja2.ext.Extension):
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


class Environment(ImmutableSandboxedEnvironment):
    """The environment of `transformers` (`_compile_jinja_template`): prompts match training."""

    intercepted_binops = frozenset(("*", "**"))

    def __init__(self, **options: Any) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[GenerationTag, jinja2.ext.loopcontrols],
            # Constants are not computed while compiling: `'x' | center(10**9)` is work of a run.
            # Only what depends on a run's context is left alone by the compiler.
            optimized=False,
            finalize=_finalize,
            **options,
        )
        self.filters["tojson"] = to_json
        self.tests["none"] = is_none
        self.globals["raise_exception"] = raise_exception
        self.globals["strftime_now"] = strftime_now
        self.globals["dict"] = DictMaker()
        self.globals["namespace"] = Namespace

    def prepared(self, source: str) -> jinja2.nodes.Template:
        """The tree that is compiled; constants are printed as the texts they are."""
        tree = self.parse(source)
        for output in tree.find_all(jinja2.nodes.Output):
            output.nodes = [
                jinja2.nodes.TemplateData(node.value, lineno=node.lineno)
                if isinstance(node, jinja2.nodes.Const) and isinstance(node.value, str)
                else node
                for node in output.nodes
            ]
        tree.set_environment(self)
        return tree

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


@jinja2.pass_context
def _finalize(context: jinja2.runtime.Context, value: object) -> object:
    return value


class DictMaker:
    """`dict` for templates, without the other attributes of the type."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        """As `dict.fromkeys`."""
        return dict.fromkeys(*args)


class Namespace(jinja2.utils.Namespace):
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


def raise_exception(message: str) -> NoReturn:
    """How a template refuses messages."""
    raise jinja2.TemplateError(message)


def strftime_now(form: str) -> str:
    """The time now."""
    return datetime.now().strftime(form)
