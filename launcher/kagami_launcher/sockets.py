"""The paths of the shards' sockets: claimed for this launcher, and cleared of old sockets."""

import errno
import fcntl
import os
import socket
import stat
from contextlib import suppress

from kagami_launcher.errors import LaunchFailed

_TIMEOUT_S = 1.0
_MAX_SOCKET_PATH = 107  # sun_path of unix(7), less its terminator


def claim(path: str) -> int:
    """Lock the socket's path: no other launcher can use it while the returned descriptor is open.

    The socket itself is no lock: it appears when the shard has loaded, and gRPC replaces one that
    is there. The kernel holds the lock, so that `kill -9` releases it; the lock's file stays.
    """
    if len(os.fsencode(path)) > _MAX_SOCKET_PATH:
        raise LaunchFailed("ShardCannotStart", f"{path} is too long for a socket's path")
    lock = f"{path}.lock"
    try:
        descriptor = _open_lock(lock)
    except OSError as error:
        raise _cannot_use(lock, error) from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            raise LaunchFailed(
                "ShardCannotStart",
                f"another launcher uses {path}: choose another --shard-uds-path",
            ) from error
        raise _cannot_use(lock, error) from error
    return descriptor


def _open_lock(path: str) -> int:
    # To read, which every user may: in /tmp the file may be one that another user left, and Linux
    # opens that neither for writing nor with a plain O_CREAT (fs.protected_regular).
    with suppress(FileExistsError):
        descriptor = os.open(path, os.O_RDONLY | os.O_CREAT | os.O_EXCL, 0o600)
        os.fchmod(descriptor, 0o644)  # whatever the umask
        return descriptor
    # A pipe under the lock's name would be waited for.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is no regular file")
    return descriptor


def _cannot_use(path: str, error: OSError) -> LaunchFailed:
    return LaunchFailed(
        "ShardCannotStart", f"cannot use {path}: {error.strerror}: choose another --shard-uds-path"
    )


def clear(path: str) -> None:
    """Remove the socket of an earlier run; raises `LaunchFailed` if a process still serves it."""
    try:
        _remove_stale(path)
    except FileNotFoundError:
        pass
    except OSError as error:
        raise _cannot_use(path, error) from error


def _remove_stale(path: str) -> None:
    mode = os.lstat(path).st_mode
    if not stat.S_ISSOCK(mode):
        raise LaunchFailed("ShardCannotStart", f"{path} exists and is not a socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(_TIMEOUT_S)
        code = probe.connect_ex(path)
    if code == 0:
        raise LaunchFailed(
            "ShardCannotStart", f"another process serves {path}: choose another --shard-uds-path"
        )
    if code != errno.ECONNREFUSED:  # only that says that nobody listens
        raise OSError(code, os.strerror(code))
    os.unlink(path)
