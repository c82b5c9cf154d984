"""What the environment variable HOSTNAME means as an address to listen on."""

import ipaddress
import socket

ANY_ADDRESS = "0.0.0.0"


def address_of_variable(hostname: str) -> str:
    """`hostname`, or every address where nobody has chosen it.

    Docker, Podman and Kubernetes set HOSTNAME to the container's own name, and some shells export
    the machine's. TGI listens on 0.0.0.0 then. Any other name was chosen, and is to be resolved.
    """
    if hostname == "localhost" or _is_address(hostname):
        return hostname
    is_own = hostname.partition(".")[0] == socket.gethostname().partition(".")[0]
    return ANY_ADDRESS if is_own or not hostname else hostname


def _is_address(hostname: str) -> bool:
    try:
        ipaddress.ip_address(hostname)
    except ValueError:
        return False
    return True
