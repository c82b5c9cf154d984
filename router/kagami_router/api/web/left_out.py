"""What of a request was left out of its answer: a header says it, so that nothing is silent."""

from collections.abc import Iterable

from aiohttp import web

_LEFT_OUT = web.RequestKey("left_out", list[str])
HEADER = "x-left-out"
# A client may name hundreds of things.
_MAX_CHARACTERS = 512


def leave_out(request: web.Request, names: Iterable[str]) -> None:
    """Note what this request asks for and does not get."""
    request.setdefault(_LEFT_OUT, []).extend(names)


def left_out_headers(request: web.Request) -> dict[str, str]:
    """The header, if anything was left out; at most 512 characters of ASCII."""
    names = dict.fromkeys(request.get(_LEFT_OUT, ()))
    if not names:
        return {}
    text = ", ".join(names).encode("ascii", "replace").decode()
    printable = "".join(one if one.isprintable() else "?" for one in text)
    is_long = len(printable) > _MAX_CHARACTERS
    return {HEADER: f"{printable[: _MAX_CHARACTERS - 3]}..." if is_long else printable}
