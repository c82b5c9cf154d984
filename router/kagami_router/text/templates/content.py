"""Finds the form of a message's `content` that a template reads: a text, a list, or either.

OpenAI's clients send both forms to any model. A template for one of them prints nothing, or
Python's notation, for the other.
"""

import enum
from collections.abc import Iterator

from jinja2 import nodes


class ContentForm(enum.Enum):
    """The form that `content` must have when the template runs."""

    TEXT = enum.auto()  # `'<|user|>' + message.content`
    EITHER = enum.auto()  # asks `content is string`, else loops over the chunks
    CHUNKS = enum.auto()  # `for chunk in message.content`, without asking


_CHUNK_MEMBERS = frozenset(("text", "type"))
_QUESTIONS = frozenset(("string", "sequence", "mapping", "iterable"))
# Filters whose result still has the chunks of the list.
_LIST_FILTERS = frozenset(
    ("list", "select", "selectattr", "reject", "rejectattr", "map", "default")
)


def content_form(tree: nodes.Template) -> ContentForm:
    """The form that this template reads: does it loop over `content`, and does it test its type?"""
    names = _aliases(tree)
    if not any(_takes_chunks(node, names) for node in tree.find_all(nodes.Node)):
        return ContentForm.TEXT
    asks = any(
        test.name in _QUESTIONS and _is_content(test.node, names)
        for test in tree.find_all(nodes.Test)
    )
    return ContentForm.EITHER if asks else ContentForm.CHUNKS


def _takes_chunks(node: nodes.Node, names: frozenset[str]) -> bool:
    """Whether the node is `for … in content` or `content[0]['text']`."""
    if isinstance(node, nodes.For):
        return _is_content(node.iter, names)
    if _member(node) in _CHUNK_MEMBERS and isinstance(node, nodes.Getattr | nodes.Getitem):
        chunk = node.node
        return (
            isinstance(chunk, nodes.Getitem)
            and _is_index(chunk.arg)
            and _is_content(chunk.node, names)
        )
    return False


def _is_index(node: nodes.Node) -> bool:
    """Whether the node is a number: 0 or -1."""
    number = node.node if isinstance(node, nodes.Neg) else node
    return isinstance(number, nodes.Const) and isinstance(number.value, int)


def _member(node: nodes.Node) -> object:
    """`x` for `a.x` and for `a['x']`, else None."""
    if isinstance(node, nodes.Getattr):
        return node.attr
    if isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Const):
        return node.arg.value
    return None


def _is_content(node: nodes.Node | None, names: frozenset[str]) -> bool:
    if isinstance(node, nodes.Filter) and node.name in _LIST_FILTERS:
        return _is_content(node.node, names)
    if isinstance(node, nodes.Name):
        return node.name in names
    return node is not None and _member(node) == "content"


def _aliases(tree: nodes.Template) -> frozenset[str]:
    """Names of a content: variables set to one, and parameters of macros called with one."""
    macros = {macro.name: macro for macro in tree.find_all(nodes.Macro)}
    names: frozenset[str] = frozenset()
    while True:
        found = frozenset(_set_to_content(tree, names)) | frozenset(
            _called_with_content(tree, macros, names)
        )
        if found <= names:
            return names
        names |= found


def _set_to_content(tree: nodes.Template, names: frozenset[str]) -> Iterator[str]:
    for assign in tree.find_all(nodes.Assign):
        if isinstance(assign.target, nodes.Name) and _is_content(assign.node, names):
            yield assign.target.name


def _called_with_content(
    tree: nodes.Template, macros: dict[str, nodes.Macro], names: frozenset[str]
) -> Iterator[str]:
    for call in tree.find_all(nodes.Call):
        macro = macros.get(call.node.name) if isinstance(call.node, nodes.Name) else None
        if macro is None:
            continue
        for parameter, argument in zip(macro.args, call.args, strict=False):
            if _is_content(argument, names):
                yield parameter.name
