"""`text-generation-router`: parse, then import what serves."""

import sys

from kagami_router.cli import parse


def main() -> None:
    """Serve until a signal; the exit code says how it ended."""
    args = parse(sys.argv[1:])
    from kagami_router.app import run  # heavy: must not slow down --help

    sys.exit(run(args))


if __name__ == "__main__":
    main()
