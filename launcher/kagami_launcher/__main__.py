"""`text-generation-launcher`: parse first, import the rest later, so that --help is instant."""

import os
import signal
import sys

from kagami_launcher import cli
from kagami_proto.process_border import process_border


@process_border
def main() -> int:
    """Run the launcher; the exit code is TGI's: 0 stopped, 1 failed, 2 usage error."""
    for number in (signal.SIGINT, signal.SIGTERM):  # nothing has been started yet
        signal.signal(number, lambda *_: os._exit(0))
    invocation = cli.parse(sys.argv[1:], os.environ)
    from kagami_launcher.main import run  # gRPC, for the health probe: 0.1 s

    return run(invocation)


if __name__ == "__main__":
    sys.exit(main())
