"""An answer as JSON."""

from collections.abc import Sequence

import msgspec
from aiohttp import web

from kagami_router.api.schemas.encoding import encode

JsonAnswer = msgspec.Struct | Sequence[msgspec.Struct]


def json_response(answer: JsonAnswer, **headers: str) -> web.Response:
    """`answer` as JSON, with these headers."""
    return web.Response(body=encode(answer), content_type="application/json", headers=headers)
