"""argv and environment of a download -> DownloadArgs; TGI's `download-weights` and its flags.

Imports nothing heavy: `--help` must be instant.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from kagami_launcher.download.files import PREFERRED
from kagami_launcher.model import hub_cache

PROGRAM = "text-generation-server download-weights"


@dataclass(frozen=True, slots=True)
class DownloadArgs:
    """What to fetch, where to, and how to talk about it."""

    model_id: str
    revision: str | None
    cache: Path
    extension: str
    auto_convert: bool
    """Whether other weights than safetensors will do"""
    trust_remote_code: bool
    is_offline: bool
    log_level: str
    json_output: bool
    draws_bars: bool
    """On /dev/tty, in place of one line for each file"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line, exit code 2."""
        self.exit(2, f"error: {message} (see {PROGRAM} --help)\n")


def parse(argv: Sequence[str], environ: Mapping[str, str], *, is_terminal: bool) -> DownloadArgs:
    """Read the flags; exits with 2 and one line on a usage error."""
    args = _parser().parse_args(argv)
    return DownloadArgs(
        model_id=args.model_id,
        revision=args.revision,
        cache=hub_cache.cache_folder(None, environ),
        extension=args.extension,
        auto_convert=args.auto_convert,
        trust_remote_code=args.trust_remote_code,
        is_offline=hub_cache.is_offline(environ),
        log_level=args.logger_level,
        json_output=args.json_output,
        draws_bars=args.progress or (is_terminal and not args.json_output),
    )


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog=PROGRAM,
        description="Fetch a model from the hub into the hub cache.",
        allow_abbrev=False,
    )
    parser.add_argument("model_id", metavar="MODEL_ID", help="a hub id such as org/name")
    parser.add_argument("--revision", help="commit, branch or tag (default: main)")
    parser.add_argument(
        "--extension",
        choices=hub_cache.WEIGHT_EXTENSIONS,
        default=PREFERRED,
        help="kind of the weights (default: %(default)s, else what there is)",
    )
    parser.add_argument(
        "--auto-convert",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="whether weights that have to be converted will do (default: yes)",
    )
    parser.add_argument("--logger-level", default="INFO", help="default: %(default)s")
    parser.add_argument("--json-output", action="store_true", help="log JSON lines")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="fetch the model's Python code too"
    )
    parser.add_argument(
        "--merge-lora",
        action="store_true",
        help="no effect: an adapter is merged when it is served",
    )
    parser.add_argument("--progress", action="store_true", help="draw a bar on the terminal")
    return parser
