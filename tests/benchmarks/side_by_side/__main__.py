"""Our server and the installed peers side by side, and the table of what was asked for.

    make bench                                                    everything
    make bench BENCH='--model llama1b --groups bf16 --rounds 1'

Peers are looked for in --peers-folder; see README.md beside this file.
"""

import argparse
import os
import signal
import sys
import tempfile
from pathlib import Path

from tests.benchmarks.side_by_side import bars, report
from tests.benchmarks.side_by_side.groups import ALL, GROUPS, Settings, measure
from tests.benchmarks.side_by_side.memory import PeakMemory
from tests.benchmarks.side_by_side.peers import PEERS
from tests.benchmarks.side_by_side.servers import NotStarted

INTERRUPTED = 130


def main() -> int:
    """Measure and tell; 1 where our own server failed, 130 where it was interrupted."""
    args = _parse(sys.argv[1:])
    # All of them unwind, so that no server is left.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    measured: list[bars.Measured] = []
    notes: list[str] = []
    with tempfile.TemporaryDirectory() as folder, PeakMemory() as memory:
        code = _measure(args, Path(folder), memory, measured, notes)
    cpuinfo = Path("/proc/cpuinfo").read_text()
    conditions = report.conditions(args.model, args.rounds, cpuinfo)
    result = report.Result(conditions, bars.lines(measured, args.model), notes, measured)
    report.show(result)
    report.write(result, json_path=args.json, markdown_path=args.markdown)
    return code


def _measure(
    args: argparse.Namespace,
    logs: Path,
    memory: PeakMemory,
    measured: list[bars.Measured],
    notes: list[str],
) -> int:
    """The groups one after another, so that memory is enough; the exit code."""
    settings = Settings(
        root=args.peers_folder,
        model=args.model,
        folder=args.folder,
        workloads=args.workloads,
        rounds=args.rounds,
        peers=args.peers,
        launcher_flags=tuple(args.launcher_flags),
        logs=logs,
    )
    code = 0
    try:
        for name in args.groups:
            try:
                measured.append(measure(GROUPS[name], settings, memory, notes))
            except NotStarted as error:
                notes.append(str(error))
                code = 1
    except KeyboardInterrupt:
        notes.append("interrupted: what was not done is missing")
        code = INTERRUPTED
    return code


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument(
        "--peers-folder",
        type=Path,
        default=Path(os.environ.get("PEERS") or Path.home() / ".cache" / "kagami-peers"),
        help="where peers and models lie (default: $PEERS, else ~/.cache/kagami-peers)",
    )
    parser.add_argument(
        "--model",
        default=bars.SMALL,
        help=f"below the peers' folder, in models/ (default: {bars.SMALL}, which is the embedded"
        " model where there is no such folder)",
    )
    _add_choice(parser, "groups", tuple(GROUPS))
    _add_choice(parser, "workloads", ALL)
    _add_choice(parser, "peers", tuple(PEERS))
    parser.add_argument("--rounds", type=int, choices=range(1, 101), default=3, metavar="N")
    parser.add_argument("--markdown", type=Path, metavar="FILE")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("launcher_flags", nargs="*", help="behind --: more flags for our launcher")
    args = parser.parse_args(argv)
    folder = args.peers_folder / "models" / args.model
    args.folder = folder if folder.is_dir() else None
    if args.folder is None and args.model != bars.SMALL:
        parser.error(f"--model: there is no {folder}")
    return args


def _add_choice(parser: argparse.ArgumentParser, name: str, allowed: tuple[str, ...]) -> None:
    def some(text: str) -> tuple[str, ...]:
        chosen = tuple(part for part in text.split(",") if part)
        for one in chosen:
            if one not in allowed:
                raise argparse.ArgumentTypeError(f"{one!r} is none of {', '.join(allowed)}")
        return chosen

    listed = ",".join(allowed)
    parser.add_argument(
        f"--{name}", type=some, default=allowed, metavar="A,B", help=f"(default: {listed})"
    )


if __name__ == "__main__":
    sys.exit(main())
