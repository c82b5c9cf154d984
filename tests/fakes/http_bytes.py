"""Requests for a fuzzer of HTTP: made of parts that servers get wrong, then damaged by the byte."""

from collections.abc import Sequence
from random import Random

CONTENT = b'{"inputs":"a","parameters":{"max_new_tokens":2}}'
_PATHS = (
    b"/generate",
    b"/generate_stream",
    b"/v1/chat/completions",
    b"/v1/messages",
    b"/tokenize",
    b"/",
    b"/health",
    b"/info",
    b"/v1/models/a",
    b"/v2/models/m/versions/1/infer",
)
_TARGETS = (
    *_PATHS,
    b"/nowhere",
    b"/v1/nowhere",
    b"/v1/models/%ff",
    b"/v1/models/\xff\xfe",
    b"/v1/models/%00%0d%0aX:1",
    b"/v1/models/" + b"a/" * 2000,
    b"/docs/../../../etc/passwd",
    b"/docs/%2e%2e/%2e%2e/etc/passwd",
    b"//health",
    b"/health?" + b"a=%ff&" * 300,
    b"http://other/health",
    b"http://[::1/health",
    b"http://a:99999999/health",
    b"*",
    b"",
    b"health",
    b"/\x00",
    b"/" + b"a" * 9000,
)
_METHODS = (
    *(b"POST", b"GET", b"HEAD", b"OPTIONS", b"PUT", b"CONNECT", b"TRACE", b"PRI", b"M-SEARCH"),
    *(b"post", b"", b"\x16\x03\x01", b"X" * 5000),
)
_VERSIONS = (b"HTTP/1.1", b"HTTP/1.0", b"HTTP/2.0", b"HTTP/0.9", b"HTTP/1.11", b"http/1.1", b"")
_HOSTS = (b"a", b"a:99999999", b"", b"[::1", b"\xff", b"a:b:c", b"a, b", b"a" * 8000)
_TYPES = (b"application/json", b"text/plain", b"", b"application/json;\xff", b"a/" + b"b" * 8000)
_LENGTHS = (
    *(b"0", b"-1", b"+48", b"0x30", b"48, 48", b"99999999999999999999999", b"1e3", b" ", b"\xb2"),
    *(b"1", b"47", b"49", b"2000001", b"18446744073709551615"),
)
_CODINGS = (
    *(b"chunked", b"Chunked", b"gzip, chunked", b"chunked, chunked", b"identity", b"xchunked"),
    *(b"chunked\x0b", b"", b"deflate"),
)
_HEADERS = (
    *(b"expect: 100-continue", b"expect: x", b"content-encoding: gzip", b"content-encoding: br"),
    *(b"connection: close", b"connection: keep-alive", b"connection: upgrade"),
    *(b"upgrade: websocket", b"upgrade: h2c", b"upgrade: \xff", b"sec-websocket-key1: a"),
    *(b"authorization: Bearer \xff", b"authorization:", b"x-api-key: \xf0\x9f"),
    *(b"origin: \xff", b"x-request-id: \xff\r", b"cookie: a=\xff; ;=;", b"accept: */*;q=9"),
    *(b"traceparent: 00-" + b"ab" * 16 + b"-" + b"cd" * 8 + b"-01", b"traceparent: \xff"),
    *(b"tracestate: a=\xff,,=", b"baggage: " + b"a=b," * 2000, b"range: bytes=0-,-1"),
    *(b"if-modified-since: Thu, 99 Foo 9999", b"x-forwarded-for: \xff, \x7f", b"user-agent: \xff"),
    *(b" folded: a", b"\tfolded", b"no colon", b": no name", b"x y: z", b"x\x00: y", b"x: \x00"),
    *(b"x: " + b"y" * 9000, b"x" * 9000 + b": y", b"x:" * 200, b"te: trailers"),
)
_CHUNKS = (
    *(b"0\r\n\r\n", b"zz\r\n", b"-1\r\n", b"ffffffffffffffff\r\n", b"10000000000000000\r\n"),
    *(
        b"1\r\naXX",
        b"1;x=" + b"y" * 5000 + b"\r\n{\r\n",
        b"0\r\nx: y\r\n\r\n",
        b"0\r\n\r\nG",
        b"\r\n",
    ),
    b"1\r\n \r\n" * 200,
)
_ENDS = (b"\r\n", b"\r\n", b"\r\n", b"\n", b"\r", b"\r\r\n", b" \r\n")


def connection_bytes(random: Random) -> Sequence[bytes]:
    """The writes of one connection: one to four requests, cut anywhere."""
    data = b"".join(_request(random) for _ in range(random.choice((1, 1, 1, 2, 4))))
    for _ in range(random.choice((0, 0, 0, 0, 1, 3))):
        data = _damaged(random, data)
    cuts = sorted(random.randrange(len(data) + 1) for _ in range(random.choice((0, 0, 1, 3))))
    return [data[start:end] for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True)]


def _request(random: Random) -> bytes:
    end = random.choice(_ENDS) if _rarely(random) else b"\r\n"
    first = b" ".join((_mostly(random, _METHODS), _target(random), _mostly(random, _VERSIONS)))
    lines = [first, b"host: " + _mostly(random, _HOSTS)]
    lines.append(b"content-type: " + _mostly(random, _TYPES))
    body = _framed(random, lines)
    lines += random.sample(_HEADERS, random.choice((0, 0, 0, 1, 1, 2)))
    if random.random() < 0.02:
        lines += [b"x: y"] * 200
    return end.join((*lines, b"", b"")) + body


def _framed(random: Random, lines: list[bytes]) -> bytes:
    """A body; the headers that frame it are added to `lines`."""
    content = CONTENT if random.random() < 0.8 else random.randbytes(random.randrange(200))
    if random.random() < 0.5:
        length = b"%d" % len(content)
        lines.append(b"content-length: " + (random.choice(_LENGTHS) if _rarely(random) else length))
        if _rarely(random):
            lines.append(b"content-length: " + random.choice(_LENGTHS))
        if not _rarely(random):
            return content
    lines.append(b"transfer-encoding: " + _mostly(random, _CODINGS))
    size = random.randrange(1, len(content) + 2)
    parts = [content[at : at + size] for at in range(0, len(content), size)]
    chunks = [b"%x\r\n%b\r\n" % (len(part), part) for part in parts]
    if _rarely(random):
        chunks.insert(random.randrange(len(chunks) + 1), random.choice(_CHUNKS))
    return b"".join(chunks) + b"0\r\n\r\n"


def _damaged(random: Random, data: bytes) -> bytes:
    start = random.randrange(len(data) + 1)
    end = min(len(data), start + random.choice((0, 1, 1, 4, 100)))
    part = data[start:end]
    instead = random.choice(
        (b"", part * 2, random.randbytes(len(part) or 1), b"\r\n", b"\x00", part[::-1])
    )
    return data[:start] + instead + data[end:]


def _target(random: Random) -> bytes:
    return random.choice(_PATHS) if random.random() < 0.7 else random.choice(_TARGETS)


def _mostly(random: Random, values: Sequence[bytes]) -> bytes:
    return random.choice(values) if _rarely(random) else values[0]


def _rarely(random: Random) -> bool:
    return random.random() < 0.06
