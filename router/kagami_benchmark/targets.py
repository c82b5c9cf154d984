"""The servers that are measured, and the route that is used on each."""

from typing import NamedTuple
from urllib.parse import urlsplit

NATIVE = "/generate_stream"
COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
PATHS = (NATIVE, COMPLETIONS, CHAT)


class Target(NamedTuple):
    """One server: its name in the tables, and its address."""

    name: str
    origin: str
    """Scheme, host and port."""
    path: str
    """One of `PATHS`."""

    @property
    def url(self) -> str:
        return self.origin + self.path


def parse_target(name: str, text: str) -> Target:
    """Parse a server's URL, with or without a route; raises `ValueError`."""
    url = urlsplit(text)
    path = url.path.rstrip("/") or NATIVE
    if url.scheme not in ("http", "https") or not url.netloc:
        raise ValueError(f"{text!r} is no http URL")
    if path not in PATHS:
        raise ValueError(f"the path of {text!r} is none of {', '.join(PATHS)}")
    return Target(name, f"{url.scheme}://{url.netloc}", path)
