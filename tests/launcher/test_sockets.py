import os
import re
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kagami_launcher import sockets
from kagami_launcher.errors import LaunchFailed


def test_a_socket_that_answers_is_left_alone(tmp_path: Path) -> None:
    path = str(tmp_path / "uds-0")
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(path)
        other.listen()
        with pytest.raises(LaunchFailed, match="choose another --shard-uds-path"):
            sockets.clear(path)
    assert os.path.exists(path)


@contextmanager
def as_somebody_else(folder: Path) -> Iterator[None]:
    """This process may change nothing in the folder meanwhile, also if the tests run as root."""
    user = os.geteuid()
    folder.chmod(0o555)
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)
        folder.chmod(0o755)


@pytest.mark.parametrize("mode", [0o777, 0o000], ids=["unlink", "connect"])
def test_a_socket_of_another_user_is_one_clear_line(mode: int) -> None:
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as served:
        path = Path(folder) / "uds-0"
        served.bind(str(path))
        path.chmod(mode)
        with as_somebody_else(path.parent), pytest.raises(LaunchFailed) as failure:
            sockets.clear(str(path))
    why = f"cannot use {path}: Permission denied: choose another --shard-uds-path"
    assert str(failure.value) == f'ShardCannotStart("{why}")'


def test_a_socket_that_cannot_be_asked_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "uds-0"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        other.bind(str(path))
        with pytest.raises(LaunchFailed, match="cannot use"):
            sockets.clear(str(path))
    assert path.is_socket()


def test_a_lock_that_another_user_left_is_no_obstacle() -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/uds-0"
        os.close(sockets.claim(path))
        with as_somebody_else(Path(folder)):
            os.close(sockets.claim(path))


def test_a_file_that_is_no_socket_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "uds-0"
    path.write_text("precious")
    with pytest.raises(LaunchFailed, match="is not a socket"):
        sockets.clear(str(path))
    assert path.read_text() == "precious"


@pytest.mark.parametrize("path", ["/tmp/" + "x" * 110, "/no/such/folder/uds-0"])
def test_an_impossible_socket_is_refused(path: str) -> None:
    with pytest.raises(LaunchFailed, match=re.escape(path)):
        sockets.claim(path)


def test_what_is_no_file_under_the_name_of_the_lock_is_refused_and_not_waited_for(
    tmp_path: Path,
) -> None:
    def listen(path: Path) -> None:
        with socket.socket(socket.AF_UNIX) as other:
            other.bind(str(path))

    kinds = (os.mkfifo, os.mkdir, listen, lambda path: path.symlink_to("/dev/zero"))
    for number, make in enumerate(kinds):
        make(tmp_path / f"uds-{number}.lock")
        with pytest.raises(LaunchFailed, match=rf"cannot use .*uds-{number}\.lock: "):
            sockets.claim(str(tmp_path / f"uds-{number}"))
