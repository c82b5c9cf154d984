"""`python -m kagami_launcher.convert`: a conversion, whose imports can fail for memory, too."""

import sys

from kagami_proto.process_border import process_border


@process_border
def main() -> int:
    """Convert; the exit code."""
    from kagami_launcher.convert import run  # numpy: inside the border

    return run.main(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
