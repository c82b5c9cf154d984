"""The real launcher, but with the children of fake_children.py: `python launch_fakes.py FLAGS`."""

import os
import signal
import sys
from collections.abc import Mapping

from kagami_launcher import cli, environment, main, process_tree


def find_fake(name: str, base: Mapping[str, str]) -> str | None:
    variable = {"text-generation-server": "FAKE_SERVER", "text-generation-router": "FAKE_WEB"}[name]
    return base[variable] or None


if __name__ == "__main__":
    # Tests that were started by `nohup` would have a launcher that ignores it.
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    environment.find_command = find_fake
    process_tree._WAITING_EVERY_S = float(os.environ.get("FAKE_WAITING_S", "10"))
    sys.exit(main.run(cli.parse(sys.argv[1:], os.environ)))
