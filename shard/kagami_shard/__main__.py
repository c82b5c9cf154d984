"""`python -m kagami_shard`, or `text-generation-server`."""

import gc
import logging
import os
import sys
import time

from kagami_proto import logs
from kagami_proto.process_border import process_border
from kagami_shard import cli


@process_border
def main() -> None:
    """Parse, then import what is heavy. Downloads are the launcher's, reached by its command."""
    if sys.argv[1:2] == ["download-weights"]:
        command = [sys.executable, "-P", "-m", "kagami_launcher.download", *sys.argv[2:]]
        os.execv(sys.executable, command)
    args = cli.process_arguments()
    logs.configure("text_generation_server", level=args.log_level, json_output=args.json_output)
    # libgomp reads it when torch is loaded; the number is from notes/0004.
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    started = time.monotonic()
    gc.disable()  # all that is imported stays: looking for garbage in it takes a sixth of the time
    from kagami_shard import server

    gc.freeze()
    gc.enable()
    seconds = round(time.monotonic() - started, 2)
    logging.getLogger(__name__).info("Libraries imported", extra={"seconds": seconds})
    sys.exit(server.serve(args))


if __name__ == "__main__":
    main()
