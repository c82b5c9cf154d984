"""Makes the OpenAPI 3.1 document from the URL table and the structs that read and write JSON.

The `Operation` of a route says what the route takes and gives. Summaries are the docstrings of the
handlers. Descriptions of schemas are the docstrings of the structs.
"""

import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, NamedTuple

import msgspec
from aiohttp.typedefs import Handler

from kagami_router.api.docs.field_texts import FIELD_TEXTS
from kagami_router.api.schemas.errors import (
    AnthropicErrorResponse,
    ErrorResponse,
    OpenAIErrorResponse,
)
from kagami_router.api.web.errors import Family

_ERROR_TYPES: Mapping[Family, type] = {
    Family.NATIVE: ErrorResponse,
    Family.OPENAI: OpenAIErrorResponse,
    Family.ANTHROPIC: AnthropicErrorResponse,
}
_UNREADABLE = (400, 413, 415, 422)
_GENERATING = (424, 429, 500)
_ALWAYS = (401, 503)
_DESCRIPTIONS: Mapping[int, str] = {
    400: "The body is not JSON; /v1: or the prompt is longer than the context.",
    401: "The API key is missing or wrong.",
    404: "What the path names is not here.",
    413: "The body is longer than --payload-limit.",
    415: "The content type is not JSON.",
    422: "A field breaks a rule; the text names it.",
    424: "The model could not compute this request.",
    429: "Every permit of --max-concurrent-requests is taken.",
    500: "The generation ended before its last token.",
    503: "The model is still loading, the server is stopping, or steps make no progress.",
}
_VARIABLE = re.compile(r"{(\w+)(:[^}]*)?}")
_JSON = "application/json"


class Section(NamedTuple):
    """A group of routes in the document; they serve the same clients."""

    name: str
    family: Family


@dataclass(frozen=True, slots=True)
class Operation:
    """What a route takes and gives."""

    section: Section
    request: Any = None
    """The type of its body, or a tuple of alternatives; None = no body."""
    answer: Any = None
    """The type of its answer; None = an empty body."""
    event: Any = None
    """The type of a stream's events; None = it never streams."""
    text: str = ""
    """The content type of an answer that is no JSON."""
    generates: bool = False
    is_open: bool = False
    """Served without the API key."""
    families: tuple[Family, ...] = ()
    """The families of its errors, if the body decides; empty = the family of its section."""
    may_fail: tuple[int, ...] = ()
    """Further statuses; the usual ones follow from the other fields."""
    example: Any = None

    @property
    def family(self) -> Family:
        """The family of its clients."""
        return self.section.family


class Route(NamedTuple):
    """One line of the URL table."""

    method: str
    path: str
    handler: Handler
    operation: Operation


def document(routes: Sequence[Route], version: str) -> Mapping[str, Any]:
    """The whole document, JSON-like."""
    types = list(_ERROR_TYPES.values())
    for route in routes:
        for kind in (route.operation.request, route.operation.answer, route.operation.event):
            types += _types_of(kind)
    schemas, components = msgspec.json.schema_components(
        types, ref_template="#/components/schemas/{name}"
    )
    for name, texts in FIELD_TEXTS.items():
        for field, text in texts.items():
            components[name]["properties"][field]["description"] = text
    refs = list(zip(types, schemas, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        path = _VARIABLE.sub(r"{\1}", route.path)
        paths.setdefault(path, {})[route.method.lower()] = _operation(route, refs)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Kagami",
            "description": "Text generation inference: TGI's API, and OpenAI's and Anthropic's.",
            "license": {"name": "Apache 2.0", "identifier": "Apache-2.0"},
            "version": version,
        },
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
    }


def _types_of(kind: Any) -> tuple[Any, ...]:
    if kind is None:
        return ()
    return kind if isinstance(kind, tuple) else (kind,)


def _operation(route: Route, refs: Sequence[tuple[Any, Any]]) -> dict[str, Any]:
    operation = route.operation

    def schema_of(kind: Any) -> Any:
        found = [next(ref for known, ref in refs if known is one) for one in _types_of(kind)]
        return found[0] if len(found) == 1 else {"anyOf": found}

    summary = (inspect.getdoc(route.handler) or "").partition("\n\n")[0].replace("\n", " ")
    written: dict[str, Any] = {
        "tags": [operation.section.name],
        "summary": summary,
        "operationId": f"{route.method.lower()}_{_identifier(route.path)}",
        "responses": {"200": _success(operation, schema_of)},
    }
    if names := [match[1] for match in _VARIABLE.finditer(route.path)]:
        written["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
            for name in names
        ]
    if operation.request is not None:
        content = {"schema": schema_of(operation.request)}
        if operation.example is not None:
            content["example"] = operation.example
        written["requestBody"] = {"required": True, "content": {_JSON: content}}
    families = operation.families or (operation.family,)
    error = schema_of(tuple(_ERROR_TYPES[family] for family in families))
    for status in _statuses(operation):
        has_body = status != HTTPStatus.NOT_FOUND or operation.family is not Family.NATIVE
        written["responses"][str(status)] = {
            "description": _DESCRIPTIONS[status],
            **({"content": {_JSON: {"schema": error}}} if has_body else {}),
        }
    if not operation.is_open:
        written["security"] = [{"key": []}, {}]
    return written


def _success(operation: Operation, schema_of: Any) -> dict[str, Any]:
    content: dict[str, Any] = {}
    if operation.answer is not None:
        content[_JSON] = {"schema": schema_of(operation.answer)}
    if operation.event is not None:
        data = {
            "type": "string",
            "contentMediaType": _JSON,
            "contentSchema": schema_of(operation.event),
        }
        content["text/event-stream"] = {
            "schema": {
                "description": "Each server-sent event; OpenAI's streams end with `[DONE]`.",
                "type": "object",
                "required": ["data"],
                "properties": {"data": {"anyOf": [{"const": "[DONE]"}, data]}},
            }
        }
    if operation.text:
        content[operation.text] = {"schema": {"type": "string"}}
    response: dict[str, Any] = {"description": HTTPStatus.OK.phrase}
    return response | ({"content": content} if content else {})


def _statuses(operation: Operation) -> list[int]:
    known = set(operation.may_fail)
    if operation.request is not None:
        known.update(_UNREADABLE)
    if operation.generates:
        known.update(_GENERATING)
    if not operation.is_open:
        known.update(_ALWAYS)
    return sorted(known)


def _identifier(path: str) -> str:
    return re.sub(r"\W+", "_", path).strip("_") or "root"
