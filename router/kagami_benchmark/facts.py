"""What a server says about itself: its model's name, and its share of the memory bandwidth."""

import asyncio
import re

import aiohttp
import msgspec
from msgspec import Struct

# An average over the last steps that only decoded; 0 if there were none.
BANDWIDTH_SHARE = "tgi_memory_bandwidth_used_ratio"
_TIMEOUT_S = 5.0


class _Info(Struct):
    model_id: str


class _Model(Struct):
    id: str


class _Models(Struct):
    data: list[_Model]


async def model_name(session: aiohttp.ClientSession, origin: str) -> str:
    """The name by which the server knows its model; "" where it does not say."""
    if (body := await _read(session, f"{origin}/v1/models")) is not None:
        try:
            models = msgspec.json.decode(body, type=_Models).data
            return models[0].id if models else ""
        except msgspec.MsgspecError:
            pass
    if (body := await _read(session, f"{origin}/info")) is not None:
        try:
            return msgspec.json.decode(body, type=_Info).model_id
        except msgspec.MsgspecError:
            pass
    return ""


async def bandwidth_share(session: aiohttp.ClientSession, origin: str) -> float | None:
    """Share of the memory bandwidth that decoding used; None where the server does not tell."""
    body = await _read(session, f"{origin}/metrics")
    return (gauge(body, BANDWIDTH_SHARE) or None) if body is not None else None


def gauge(metrics: bytes, name: str) -> float | None:
    """The value of a gauge in Prometheus' text; None where it is missing, or no number."""
    pattern = rf"^{name}(?:{{[^}}]*}})? (\S+)$"
    found = re.search(pattern, metrics.decode(errors="replace"), re.MULTILINE)
    try:
        return float(found[1]) if found else None
    except ValueError:
        return None


async def _read(session: aiohttp.ClientSession, url: str) -> bytes | None:
    try:
        async with asyncio.timeout(_TIMEOUT_S), session.get(url) as response:
            return await response.read() if response.status == 200 else None
    except (aiohttp.ClientError, TimeoutError):
        return None
