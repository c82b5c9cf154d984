"""Whether the server in this container answers /health with 200; for Docker's HEALTHCHECK.

Asks the loopback at $PORT directly; proxies of the environment are ignored.
"""

import http.client
import os
import sys


def main() -> int:
    """0: healthy; 1: not, with the reason as one line."""
    port = int(os.environ["PORT"])
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=4)
    try:
        connection.request("GET", "/health")
        status = connection.getresponse().status
    except OSError as error:
        sys.stdout.write(f"port {port}: {error}\n")
        return 1
    sys.stdout.write(f"/health: {status}\n")
    return 0 if status == http.HTTPStatus.OK else 1


if __name__ == "__main__":
    sys.exit(main())
