"""`python -m kagami_launcher.download`: parse first, import the hub's library later."""

import os
import signal
import sys

from kagami_launcher.download import cli
from kagami_proto import logs
from kagami_proto.process_border import process_border


@process_border
def main() -> int:
    """Download; a refusal is one ERROR line and exit code 1."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # transfers are threads: end them at once
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)  # the launcher's child draws from the background
    args = cli.parse(sys.argv[1:], os.environ, is_terminal=sys.stderr.isatty())
    logs.configure("text_generation_server", level=args.log_level, json_output=args.json_output)
    from kagami_launcher.download import run

    return run.run(args)


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    os._exit(
        code
    )  # after a failure other transfers still run; what they have stays for the next try
