"""A check of JSON schemas that grammars and tools share."""

from collections.abc import Mapping
from typing import Any


def requires_unnamed(schema: Mapping[str, Any]) -> bool:
    """Whether `required` has names that `properties` lacks; nothing would match if closed."""
    properties, required = schema.get("properties"), schema.get("required")
    if not isinstance(properties, Mapping) or not isinstance(required, list):
        return False
    return any(isinstance(name, str) and name not in properties for name in required)
