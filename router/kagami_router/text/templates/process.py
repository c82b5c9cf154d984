"""The router's end of the rendering process: started for the first job, ended by the last owner.

Called on threads, one at a time. A process that takes too long, or more memory than it may, is
ended; the next job starts another one (0.1 s).
"""

import pickle
import select
import subprocess
import sys
import time
import weakref
from collections.abc import Mapping
from threading import Lock
from typing import IO

from kagami_proto.errors import TemplateError
from kagami_router.text.templates import worker
from kagami_router.text.templates.engine import MAX_CHARACTERS
from kagami_router.text.templates.prompt import Job

# A character takes four bytes at most.
_MAX_ANSWER = 4 * MAX_CHARACTERS + 1
_CHUNK = 1 << 16
_COMMAND = (sys.executable, "-P", "-m", worker.__name__)


class RenderProcess:
    """Renders jobs in another process; close it at the end."""

    def __init__(self, sources: Mapping[str, str]) -> None:
        """`sources` are the templates by name."""
        self._sources = dict(sources)
        self._running: subprocess.Popen[bytes] | None = None
        self._ends: weakref.finalize[[subprocess.Popen[bytes]], RenderProcess] | None = None
        self._is_closed = False
        self._lock = Lock()

    def close(self) -> None:
        """End the process, and refuse further jobs."""
        self._is_closed = True
        if (process := self._running) is not None:
            process.kill()  # a job that waits for it ends
        with self._lock:
            self._end()

    def prompt(self, job: Job, max_seconds: float = worker.MAX_SECONDS) -> str:
        """The whole prompt; raises `TemplateError`."""
        try:
            message = pickle.dumps(tuple(job))
        except RecursionError as error:
            raise TemplateError("the messages are nested too deeply") from error
        with self._lock:
            try:
                answer = self._exchange(message, time.monotonic() + max_seconds)
            except TimeoutError as error:
                self._end()
                raise TemplateError(f"rendering took more than {max_seconds:g} s") from error
            except OSError as error:
                raise TemplateError(self._failure()) from error
        if answer[:1] == worker.TEXT:
            return answer[1:].decode(errors="surrogatepass")
        text, field = pickle.loads(answer[1:])
        raise TemplateError(text, field=field)

    def _exchange(self, message: bytes, deadline: float) -> bytes:
        """What the process says of a message; raises `OSError`, `TimeoutError`."""
        if self._is_closed:
            raise TemplateError("the server stops")
        process = self._running or self._start()
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(worker.LENGTH.pack(len(message)))
        process.stdin.write(message)
        process.stdin.flush()
        (length,) = worker.LENGTH.unpack(_read(process.stdout, worker.LENGTH.size, deadline))
        if length > _MAX_ANSWER:
            raise OSError("no answer is so long")
        return _read(process.stdout, length, deadline)

    def _start(self) -> subprocess.Popen[bytes]:
        sources = pickle.dumps(self._sources)
        process = self._running = subprocess.Popen(
            _COMMAND, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        self._ends = weakref.finalize(self, _kill, process)  # if nobody closes this
        assert process.stdin is not None
        process.stdin.write(worker.LENGTH.pack(len(sources)) + sources)
        return process

    def _failure(self) -> str:
        """Why the process is gone, which it is after this."""
        code = self._end()
        return f"the rendering process ended ({f'signal {-code}' if code < 0 else code})"

    def _end(self) -> int:
        process, self._running = self._running, None
        if process is None:
            return 0
        if self._ends is not None:
            self._ends.detach()
        return _kill(process)


def _kill(process: subprocess.Popen[bytes]) -> int:
    """End the process; its exit code says if it had ended by itself."""
    ended = process.poll()
    process.kill()
    for pipe in (process.stdin, process.stdout):
        _close(pipe)
    code = process.wait()
    return code if ended is None else ended


def _read(source: IO[bytes], size: int, deadline: float) -> bytes:
    ready = select.poll()
    ready.register(source, select.POLLIN)
    chunks, left = [], size
    while left:
        if not ready.poll(max(0.0, deadline - time.monotonic()) * 1e3):
            raise TimeoutError
        chunk = source.read1(min(left, _CHUNK))  # type: ignore[attr-defined]  # it is buffered
        if not chunk:
            raise ConnectionError("the process has ended")
        chunks.append(chunk)
        left -= len(chunk)
    return b"".join(chunks)


def _close(pipe: IO[bytes] | None) -> None:
    try:
        if pipe is not None:
            pipe.close()
    except OSError:  # what was left to write has no reader
        pass
