"""One request over HTTP, and when each of its tokens came.

The client shares the machine with the server it measures, so it does little: bytes are split at
line ends, only the counted parts of an event are decoded, and the time is noted.
"""

import asyncio
import time
from array import array
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import aiohttp
import msgspec

from kagami_benchmark.routes import Seen

# A server's page about an error may be long.
_MAX_ERROR = 200


@dataclass(slots=True, eq=False)
class Outcome:
    """What came of one request; filled while the answer comes. Times are seconds of one clock."""

    started: float
    """When it was sent; with a request rate, when it should have been sent."""
    arrivals: "array[float]" = field(default_factory=lambda: array("d"))
    """The time at which each event with a token came."""
    ended: float = 0.0
    prompt_tokens: int = 0
    output_tokens: int = 0
    """The server's count of tokens, else the number of events."""
    error: str = ""

    @property
    def succeeded(self) -> bool:
        return not self.error and bool(self.ended)


class Client:
    """Sends requests to one server."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        url: str,
        read: Callable[[bytes], Seen],
        *,
        timeout_s: float,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._session = session
        self._url = url
        self._read = read
        self._timeout_s = timeout_s
        self.clock = clock

    async def ask(self, body: bytes, outcome: Outcome) -> None:
        """Send `body` and read the whole answer; a failure is written to `outcome.error`."""
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._stream(body, outcome)
        except TimeoutError:
            outcome.error = f"no whole answer within {self._timeout_s:g} s"
        except aiohttp.ClientError as error:
            outcome.error = _short(str(error) or type(error).__name__)
        except msgspec.MsgspecError as error:
            outcome.error = _short(f"an event is not understood: {error}")
        else:
            if not outcome.error and not outcome.arrivals:
                outcome.error = "the answer had no token"
        outcome.ended = self.clock()

    async def _stream(self, body: bytes, outcome: Outcome) -> None:
        async with self._session.post(self._url, data=body) as response:
            if response.status != 200:
                text = await response.text(errors="replace")
                outcome.error = _short(f"{response.status} {text}")
                return
            pending = b""
            async for data in response.content.iter_any():
                now = self.clock()
                *lines, pending = (pending + data).split(b"\n")
                for line in lines:
                    if line.startswith(b"data:"):
                        self._take(self._read(line[5:].strip()), outcome, now)

    def _take(self, seen: Seen, outcome: Outcome, now: float) -> None:
        if seen.has_token:
            outcome.arrivals.append(now)
            outcome.output_tokens += 1
        if seen.prompt_tokens is not None:
            outcome.prompt_tokens = seen.prompt_tokens
        if seen.output_tokens is not None:
            outcome.output_tokens = seen.output_tokens
        if seen.error:
            outcome.error = _short(seen.error)


@asynccontextmanager
async def connecting(api_key: str | None) -> AsyncIterator[aiohttp.ClientSession]:
    """A session with as many connections as there are requests, a new one for each."""
    headers = {"content-type": "application/json"}
    if api_key:
        headers["authorization"] = f"Bearer {api_key}"
    async with aiohttp.ClientSession(
        # Some servers close a connection after a stream without saying so.
        connector=aiohttp.TCPConnector(limit=0, force_close=True),
        timeout=aiohttp.ClientTimeout(total=None),
        headers=headers,
    ) as session:
        yield session


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _MAX_ERROR else f"{line[:_MAX_ERROR]}…"
