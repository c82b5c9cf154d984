"""What is decided about a body before its first byte is read: its coding, its length, 100-continue.

A handler asks for the body only after the route is found and the key is checked. Until then a
request costs its head, and what one read of the socket brought.
"""

from contextlib import suppress
from typing import Any

from aiohttp import HttpVersion11, hdrs, web
from aiohttp.http import RawRequestMessage
from multidict import CIMultiDict, CIMultiDictProxy

from kagami_proto.errors import BodyTooLarge, CodedBody

# Whether the client sends its body only after `100 Continue`, and waits for that now.
_WAITS = web.RequestKey("waits_for_continue", bool)
_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"


class SlowBody(web.RequestPayloadError):
    """The body did not come in time."""


class ExpectingRequests:
    """Makes the requests of an application, and keeps `Expect` from aiohttp.

    aiohttp would answer `100 Continue` before anything is known about the request. An expectation
    that is none of HTTP's is ignored.
    """

    def __init__(self, make: Any) -> None:
        self._make = make

    def __call__(self, message: RawRequestMessage, *args: Any) -> web.BaseRequest:
        """The request of `message`; `args` are aiohttp's own."""
        expectation = message.headers.get(hdrs.EXPECT)
        if expectation is None:
            request: web.BaseRequest = self._make(message, *args)
            return request
        headers = CIMultiDict(message.headers)
        del headers[hdrs.EXPECT]
        request = self._make(message._replace(headers=CIMultiDictProxy(headers)), *args)
        if expectation.lower() == "100-continue" and message.version == HttpVersion11:
            request[_WAITS] = True
        return request


async def ask_for_body(request: web.Request) -> None:
    """Let the body come; raises `CodedBody` or `BodyTooLarge` where it is not wanted.

    A compressed body is refused, not unpacked: 1 MB can become 1 GB, and whoever sends it pays
    nothing. TGI reads no compressed body either.
    """
    coding = request.headers.get(hdrs.CONTENT_ENCODING, "").strip().lower()
    if coding not in ("", "identity"):
        raise CodedBody("Expected a request without `Content-Encoding`: bodies are not unpacked")
    if (request.content_length or 0) > request.client_max_size:
        raise too_large(request)
    if request.pop(_WAITS, False):
        with suppress(ConnectionError):  # the client has gone: whoever reads the body learns it
            await request.writer.write(_CONTINUE)
        request.writer.output_size = 0  # the answer itself has not begun


def too_large(request: web.Request) -> BodyTooLarge:
    """The error of a body that is longer than the limit."""
    return BodyTooLarge(
        "Failed to buffer the request body: length limit exceeded"
        f" ({request.client_max_size} bytes, set by --payload-limit)"
    )


def without_body(request: web.Request, response: web.Response) -> web.Response:
    """`response`, ending the connection if the client still holds its body back.

    Nobody knows whether the body follows: no other request can be read from this connection.
    """
    if request.get(_WAITS):
        response.force_close()
    return response
