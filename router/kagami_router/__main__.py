"""`text-generation-router`: parse, then import what serves."""

import sys

from kagami_proto.process_border import process_border
from kagami_router.cli import parse


@process_border
def main() -> None:
    """Serve until a signal; the exit code says how it ended."""
    if sys.argv[1:] == ["print-schema"]:
        from kagami_router.api.routes import document  # heavy, as below

        print(document())  # noqa: T201 - what it was asked for
        return
    args = parse(sys.argv[1:])
    from kagami_router.app import run  # heavy: must not slow down --help

    sys.exit(run(args))


if __name__ == "__main__":
    main()
