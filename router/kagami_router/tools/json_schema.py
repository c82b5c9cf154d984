"""Closes JSON schemas: objects have only the properties that are named, as in TGI and at OpenAI.

JSON Schema lets an object have further properties unless it is closed, and a model would invent
some. An object that several parts describe (`allOf`, `$ref` beside `properties`, …) is closed as a
whole, with the names of all its parts. What names no properties, or allows others, stays open.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from kagami_router.tools.casting import resolved

_MAX_DEPTH = 16  # of references and parts that are followed
# Keys whose value is one schema, a list, or a table of schemas that describe other values.
_ONE = ("items", "contains", "additionalProperties", "propertyNames")
_LIST = ("prefixItems",)
_TABLE = ("properties", "patternProperties", "$defs", "definitions")
# Keys whose schemas describe the same value.
_PARTS = ("allOf", "anyOf", "oneOf", "then", "else", "dependentSchemas")
_OPENING = ("patternProperties", "unevaluatedProperties", "$dynamicRef")


def requires_unnamed(schema: Mapping[str, Any]) -> bool:
    """Whether `required` has names that `properties` lacks; nothing would match if closed."""
    properties, required = schema.get("properties"), schema.get("required")
    if not isinstance(properties, Mapping) or not isinstance(required, list):
        return False
    return any(isinstance(name, str) and name not in properties for name in required)


def closed(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The same schema with closed objects; raises `RecursionError` if it is nested too deeply."""
    return dict(_Closing(schema).schema(schema, "#"))


class _Closing:
    def __init__(self, root: Mapping[str, Any]) -> None:
        self._root = root
        # What is a part of an object somewhere must not be closed by itself.
        self._shared = frozenset(
            reference
            for one in _all_schemas(root)
            if _is_composed(one)
            for reference in self._references(one, 0)
        )

    def schema(self, schema: Any, place: str = "") -> Any:
        """The schema of a whole value, closed."""
        if not isinstance(schema, Mapping):
            return schema
        if not _is_composed(schema):
            made = self._inside(schema, self.schema)
            is_open = any(key in made for key in _OPENING) or requires_unnamed(made)
            if "properties" in made and not is_open and place not in self._shared:
                made.setdefault("additionalProperties", False)
            return made
        made = self._inside(schema, self._part)
        names = self._names(schema, 0)
        if names and place not in self._shared:
            own = made.get("properties")
            own = own if isinstance(own, Mapping) else {}
            made["properties"] = {**own, **{name: {} for name in names if name not in own}}
            made.setdefault("additionalProperties", False)
        return made

    def _part(self, schema: Any) -> Any:
        """A part of an object, which is closed with the others."""
        return self._inside(schema, self._part) if isinstance(schema, Mapping) else schema

    def _inside(self, schema: Mapping[str, Any], of_part: Any) -> dict[str, Any]:
        """The schema with everything in it closed, but not itself."""
        made = dict(schema)
        for key in _ONE:
            if key in made:
                made[key] = self.schema(made[key])
        for key in _LIST:
            if isinstance(made.get(key), list):
                made[key] = [self.schema(one) for one in made[key]]
        for key in _TABLE:
            if isinstance(table := made.get(key), Mapping):
                made[key] = {n: self.schema(one, f"#/{key}/{n}") for n, one in table.items()}
        for key in _PARTS:
            match made.get(key):
                case list(parts):
                    made[key] = [of_part(one) for one in parts]
                case Mapping() as part if key == "dependentSchemas":
                    made[key] = {name: of_part(one) for name, one in part.items()}
                case Mapping() as part:
                    made[key] = of_part(part)
                case _:
                    pass
        return made

    def _names(self, schema: Any, depth: int) -> list[str] | None:
        """The properties that a schema and its parts name; None = it may have others."""
        if not isinstance(schema, Mapping):
            return []
        further = schema.get("additionalProperties", False)
        if depth > _MAX_DEPTH or further is not False or any(key in schema for key in _OPENING):
            return None
        properties, required = schema.get("properties"), schema.get("required")
        names = list(properties) if isinstance(properties, Mapping) else []
        names += [one for one in required or () if isinstance(one, str)]
        for part in _parts(schema):
            more = self._names(part, depth + 1)
            if more is None:
                return None
            names += more
        if isinstance(reference := schema.get("$ref"), str):
            more = self._names(resolved(reference, self._root), depth + 1)
            if more is None:
                return None
            names += more
        return list(dict.fromkeys(names))

    def _references(self, schema: Any, depth: int) -> Iterator[str]:
        """Those that describe the same value as a part."""
        if not isinstance(schema, Mapping) or depth > _MAX_DEPTH:
            return
        if isinstance(reference := schema.get("$ref"), str):
            yield reference
            yield from self._references(resolved(reference, self._root), depth + 1)
        for part in _parts(schema):
            yield from self._references(part, depth + 1)


def _is_composed(schema: Mapping[str, Any]) -> bool:
    """Whether several parts describe one object; alternatives alone do not, nor one wrapper."""
    number = sum(1 for key in ("allOf",) for _ in _listed(schema, key))
    number += "properties" in schema
    number += "$ref" in schema
    others = any(key in schema for key in ("anyOf", "oneOf", "then", "else", "dependentSchemas"))
    return number > 1 or (number == 1 and others)


def _parts(schema: Mapping[str, Any]) -> Iterator[Any]:
    for key in _PARTS:
        value = schema.get(key)
        if key == "dependentSchemas" and isinstance(value, Mapping):
            yield from value.values()
        elif isinstance(value, list):
            yield from value
        elif isinstance(value, Mapping):
            yield value


def _listed(schema: Mapping[str, Any], key: str) -> list[Any]:
    value = schema.get(key)
    return value if isinstance(value, list) else []


def _all_schemas(root: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The schema itself and every schema inside it."""
    left: list[Any] = [root]
    while left:
        schema = left.pop()
        if isinstance(schema, Mapping):
            yield schema
            left += [schema[key] for key in _ONE if key in schema]
            left += _parts(schema)
            for key in _LIST:
                left += _listed(schema, key)
            for key in _TABLE:
                if isinstance(table := schema.get(key), Mapping):
                    left += table.values()
