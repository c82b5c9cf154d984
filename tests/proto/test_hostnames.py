import socket

import pytest

from kagami_proto.hostnames import ANY_ADDRESS, address_of_variable


@pytest.mark.parametrize(
    "name", ["127.0.0.1", "::1", "fe80::1%eth0", "localhost", "inside.example.com", "3f2a1b-other"]
)
def test_what_somebody_chose_is_kept(name: str) -> None:
    assert address_of_variable(name) == name


@pytest.mark.parametrize("own", ["4ffe1b16383f", "pod-0", "pod-0.pods.default.svc.cluster.local"])
@pytest.mark.parametrize("suffix", ["", ".pods.default.svc.cluster.local"])
def test_the_name_of_a_container_means_every_address(
    own: str, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: own)
    assert address_of_variable(own.partition(".")[0] + suffix) == ANY_ADDRESS


def test_nothing_means_every_address() -> None:
    assert address_of_variable("") == ANY_ADDRESS
