"""Who sent a request, as far as fairness between callers goes: an address, or what a header says.

A caller is the address of the connection. The API key does not tell callers apart, because a
server has one key for all. A key that nobody checks, or `X-Forwarded-For`, can be new in every
request, and whoever makes it up would be many callers. So a header counts only where the operator
named it (`--caller-header`), behind a proxy that writes or checks it.
"""

import hashlib
import ipaddress

from aiohttp import web

# The header that names the caller; "" = none does.
CALLER_HEADER = web.AppKey("caller_header", str)
# One home or one machine has a whole network of this length: all of it is one caller.
_IPV6_PREFIX = 64


def caller_of(request: web.Request) -> str:
    """The caller's name: short, the same for all of its requests, and not fit for a log."""
    if name := request.app[CALLER_HEADER]:
        # Of a list, and of several lines, the last entry is the one that our own proxy wrote.
        if given := ",".join(request.headers.getall(name, ())).rpartition(",")[2].strip():
            return _network_of(given) or hashlib.sha256(given.encode(errors="replace")).hexdigest()
    return _network_of(request.remote or "")


def _network_of(address: str) -> str:
    """An IPv4 address, or the network of an IPv6 address; "" for anything else."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return ""
    if isinstance(parsed, ipaddress.IPv4Address):
        return str(parsed)
    if parsed.ipv4_mapped is not None:
        return str(parsed.ipv4_mapped)
    return str(ipaddress.ip_network((int(parsed), _IPV6_PREFIX), strict=False).network_address)
