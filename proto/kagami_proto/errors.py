"""The exception tree, and the one table that says what each becomes at a border.

```
KagamiError
├─ InvalidRequest            the client's fault: a field, its limit and the value given
│  ├─ MalformedBody          not JSON, or JSON of the wrong shape
│  ├─ BodyTooLarge           longer than --payload-limit
│  ├─ UnsupportedMediaType   Content-Type is not JSON
│  └─ TemplateError          the chat template is missing or refuses the messages
├─ Overloaded                no permit free: the client may come back later
├─ Unavailable               not ready yet, or draining
├─ Unhealthy                 steps make no progress
├─ GenerationFailed          the shard could not compute this request
│  └─ ShardLost              the shard went away while the request ran
└─ IncompleteGeneration      the stream ended without its last token
```

The class says whose fault it is. Anything outside the tree is a bug: logged with its traceback, 500.
"""

from collections.abc import Mapping
from http import HTTPStatus
from types import MappingProxyType
from typing import NamedTuple


class KagamiError(Exception):
    """Root of the tree; `str()` is the text a client may read."""


class InvalidRequest(KagamiError):
    """The request breaks a rule; the text names the field, the limit and the value."""


class MalformedBody(InvalidRequest):
    """The body is not JSON or has not the route's shape."""


class BodyTooLarge(InvalidRequest):
    """The body is longer than the limit."""


class UnsupportedMediaType(InvalidRequest):
    """The content type is not JSON."""


class TemplateError(InvalidRequest):
    """The chat template is missing, or failed on these messages."""


class Overloaded(KagamiError):
    """Every permit is taken."""


class Unavailable(KagamiError):
    """The server is starting or stopping."""


class Unhealthy(KagamiError):
    """Steps make no progress."""


class GenerationFailed(KagamiError):
    """A shard could not compute this request."""


class ShardLost(GenerationFailed):
    """The connection to a shard broke while the request ran."""


class IncompleteGeneration(KagamiError):
    """The token stream ended before its last token."""


class Row(NamedTuple):
    """What an error becomes: TGI's `error_type`, an HTTP status, the text's prefix."""

    kind: str
    status: HTTPStatus
    prefix: str


TABLE: Mapping[type[KagamiError], Row] = MappingProxyType(
    {
        InvalidRequest: Row(
            "validation", HTTPStatus.UNPROCESSABLE_ENTITY, "Input validation error: "
        ),
        MalformedBody: Row("validation", HTTPStatus.UNPROCESSABLE_ENTITY, ""),
        BodyTooLarge: Row("validation", HTTPStatus.REQUEST_ENTITY_TOO_LARGE, ""),
        UnsupportedMediaType: Row("validation", HTTPStatus.UNSUPPORTED_MEDIA_TYPE, ""),
        TemplateError: Row(
            "template_error", HTTPStatus.UNPROCESSABLE_ENTITY, "Template error: "
        ),
        Overloaded: Row("overloaded", HTTPStatus.TOO_MANY_REQUESTS, ""),
        Unavailable: Row("unavailable", HTTPStatus.SERVICE_UNAVAILABLE, ""),
        Unhealthy: Row("healthcheck", HTTPStatus.SERVICE_UNAVAILABLE, ""),
        GenerationFailed: Row(
            "generation", HTTPStatus.FAILED_DEPENDENCY, "Request failed during generation: "
        ),
        IncompleteGeneration: Row(
            "incomplete_generation", HTTPStatus.INTERNAL_SERVER_ERROR, "Incomplete generation: "
        ),
    }
)


def row_of(error: BaseException) -> Row | None:
    """The row of the nearest ancestor in `TABLE`, or None for an error outside the tree."""
    for ancestor in type(error).__mro__:
        if row := TABLE.get(ancestor):
            return row
    return None
