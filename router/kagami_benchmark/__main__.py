"""`text-generation-benchmark`: parse first, import the rest later."""

import sys

from kagami_benchmark.cli import Compare, parse


def main() -> None:
    """Measure, or compare what was measured; the exit code says whether anything succeeded."""
    args = parse(sys.argv[1:])
    # Heavy: must not slow down --help.
    if isinstance(args, Compare):
        from kagami_benchmark.compare import compare

        sys.exit(compare(args))
    from kagami_benchmark.run import run

    sys.exit(run(args))


if __name__ == "__main__":
    main()
