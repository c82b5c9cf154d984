"""Which servers are measured, and by which of their routes."""

from typing import NamedTuple
from urllib.parse import urlsplit

NATIVE = "/generate_stream"
COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
PATHS = (NATIVE, COMPLETIONS, CHAT)


class Target(NamedTuple):
    """One server: what the tables call it, and where it is asked."""

    name: str
    origin: str
    """Scheme, host and port."""
    path: str
    """One of `PATHS`."""

    @property
    def url(self) -> str:
        return self.origin + self.path


def parse_target(name: str, text: str) -> Target:
    """A server's URL with or without the route; raises `ValueError`."""
    url = urlsplit(text)
    path = url.path.rstrip("/") or NATIVE
    if url.scheme not in ("http", "https") or not url.netloc:
        raise ValueError(f"{text!r} is no http URL")
    if path not in PATHS:
        raise ValueError(f"the path of {text!r} is none of {', '.join(PATHS)}")
    return Target(name, f"{url.scheme}://{url.netloc}", path)
