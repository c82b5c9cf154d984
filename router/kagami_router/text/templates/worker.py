"""The rendering process: runs templates that are not surely small, within limits of its own.

It reads jobs from its standard input and writes texts to its standard output. A job that takes too
long ends the process: by its limit of processor time, or by the router. Nothing of the template
leaves it but the text.
"""

import pickle
import resource
import signal
import struct
import sys
import time
from collections.abc import Mapping
from typing import BinaryIO

from kagami_proto.errors import TemplateError
from kagami_router.text.templates.engine import Program
from kagami_router.text.templates.prompt import Job, ModelTemplate

# The address space; Python and jinja2 take 40 MB, and the longest prompt three times its size.
MAX_MEMORY = 512 * 1024 * 1024
# A normal template needs 0.03 s for ten thousand messages.
MAX_SECONDS = 5.0
LENGTH = struct.Struct(">Q")
# What an answer begins with.
TEXT, REFUSED = b"t", b"e"


def main() -> None:
    """Serve jobs until the standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the router ends it
    _limit(resource.RLIMIT_CORE, 0)
    _limit(resource.RLIMIT_AS, MAX_MEMORY)
    given, answers = sys.stdin.buffer, sys.stdout.buffer
    sources: Mapping[str, str] = pickle.loads(read(given))
    templates: dict[str, ModelTemplate] = {}
    while job := read(given):
        _limit(resource.RLIMIT_CPU, int(time.process_time() + MAX_SECONDS) + 2)
        answer = _answer(job, sources, templates)
        answers.write(LENGTH.pack(len(answer)) + answer[:1])
        answers.write(memoryview(answer)[1:])
        answers.flush()


def read(given: BinaryIO) -> bytes:
    """The next message; empty at the end."""
    head = given.read(LENGTH.size)
    return given.read(*LENGTH.unpack(head)) if len(head) == LENGTH.size else b""


def _answer(
    message: bytes, sources: Mapping[str, str], templates: dict[str, ModelTemplate]
) -> bytes:
    try:
        job = Job(*pickle.loads(message))
        if job.template not in templates:
            templates[job.template] = ModelTemplate(Program(sources[job.template]))
        text = templates[job.template].prompt(job)
        return TEXT + text.encode(errors="surrogatepass")
    except TemplateError as error:
        return REFUSED + pickle.dumps((str(error)[:10_000], error.field))
    except MemoryError:
        return REFUSED + pickle.dumps((_TOO_LARGE, None))


_TOO_LARGE = f"rendering took more than {MAX_MEMORY >> 20} MB"


def _limit(kind: int, soft: int) -> None:
    _, hard = resource.getrlimit(kind)
    resource.setrlimit(kind, (soft if hard == resource.RLIM_INFINITY else min(soft, hard), hard))


if __name__ == "__main__":
    main()
