"""What systemd would hear, from a launcher with fake children and from the notifier alone."""

import socket
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest

from kagami_launcher.environment import for_router, for_shard
from kagami_launcher.notify import Notifier, NotifySettings

Launch = Callable[..., Any]


class Manager:
    """Listens as systemd does."""

    def __init__(self, address: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.socket.bind(address.replace("@", "\0", 1))
        self.socket.settimeout(10)
        self.heard: list[dict[str, str]] = []

    def hear(self) -> dict[str, str]:
        lines = self.socket.recv(4096).decode().splitlines()
        self.heard.append(dict(line.split("=", 1) for line in lines))
        return self.heard[-1]

    def hear_until(self, name: str, value: str) -> dict[str, str]:
        while (said := self.hear()).get(name) != value:
            pass
        return said


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    listening = Manager(str(tmp_path / "notify"))
    yield listening
    listening.socket.close()


@contextmanager
def notifier(address: str, watchdog_s: float | None = None) -> Iterator[Notifier]:
    with closing(Notifier(NotifySettings(address, watchdog_s))) as told:
        yield told


def address_of(manager: Manager) -> str:
    return str(manager.socket.getsockname())


def test_without_a_manager_nothing_is_said() -> None:
    silent = Notifier(NotifySettings.of({}, 1))
    silent.serving("Serving", is_ready=True)
    assert (silent.is_on, silent.is_due, silent.wait_s) == (False, False, None)


@pytest.mark.parametrize(
    ("variables", "watchdog_s"),
    [
        ({}, None),
        ({"WATCHDOG_USEC": "30000000"}, 30),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "7"}, 30),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "8"}, None),
        ({"WATCHDOG_USEC": "0"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
    ],
)
def test_the_watchdog_is_that_of_this_process(
    variables: dict[str, str], watchdog_s: float | None
) -> None:
    settings = NotifySettings.of({"NOTIFY_SOCKET": "/run/x", **variables}, 7)
    assert settings == NotifySettings("/run/x", watchdog_s)


def test_a_socket_of_another_kind_is_ignored() -> None:
    assert NotifySettings.of({"NOTIFY_SOCKET": "vsock:2:1"}, 1) == NotifySettings()


def test_ready_is_told_once_with_a_status(manager: Manager) -> None:
    with notifier(address_of(manager)) as told:
        told.serving("Serving", is_ready=True)
    assert manager.hear() == {"STATUS": "Serving", "READY": "1"}


def test_the_watchdog_is_fed_only_while_alive(manager: Manager) -> None:
    with notifier(address_of(manager), 30) as told:
        told.serving("Serving")
        told.serving("Steps make no progress", is_alive=False)
    assert manager.hear() == {"STATUS": "Serving", "WATCHDOG": "1"}
    assert manager.hear() == {"STATUS": "Steps make no progress"}


def test_it_is_fed_three_times_in_its_time(manager: Manager) -> None:
    with notifier(address_of(manager), 6) as told:
        told.serving("Serving")
        assert told.wait_s is not None
        assert 1.5 < told.wait_s <= 2


def test_a_start_asks_for_patience_before_it_ends(manager: Manager) -> None:
    with notifier(address_of(manager)) as told:
        told.starting("Loading m")
        said = manager.hear()
        assert said["STATUS"] == "Loading m"
        assert told.wait_s is not None
        assert told.wait_s < int(said["EXTEND_TIMEOUT_USEC"]) / 1e6


def test_an_abstract_socket_works() -> None:
    address = f"@kagami-test-{time.monotonic_ns()}"
    manager = Manager(address)
    with notifier(address) as told:
        told.stopping()
    assert manager.hear()["STOPPING"] == "1"
    manager.socket.close()


def test_a_manager_that_is_gone_ends_nothing(tmp_path: Path) -> None:
    with notifier(str(tmp_path / "nobody")) as told:
        told.serving("Serving")


def test_children_do_not_speak_to_the_manager() -> None:
    base = {"NOTIFY_SOCKET": "/x", "WATCHDOG_USEC": "1", "WATCHDOG_PID": "1", "KEPT": "1"}
    for env in (for_shard(base, {}), for_router(base, {})):
        assert {"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"}.isdisjoint(env)
        assert env["KEPT"] == "1"


def test_a_launch_tells_its_way_from_loading_to_its_end(launch: Launch, manager: Manager) -> None:
    launcher = launch(NOTIFY_SOCKET=manager.socket.getsockname(), WATCHDOG_USEC="300000")
    manager.hear_until("READY", "1")
    statuses = [said["STATUS"].split()[0] for said in manager.heard]
    assert statuses == ["Loading", "Warming", "Serving"]
    # The fake router serves no HTTP: what does not answer is not fed.
    said = manager.hear()
    assert said["STATUS"].startswith("The router does not answer")
    assert "WATCHDOG" not in said
    launcher.process.terminate()
    manager.hear_until("STOPPING", "1")
