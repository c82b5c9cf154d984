"""`python -m kagami_shard.backends.native CACHE`: build the library into the folder CACHE.

Says in one line what came of it, and never fails an installation: without the library torch
computes.
"""

import sys
from pathlib import Path

from kagami_shard.backends.native.build import BuildFailed, build
from kagami_shard.backends.native.cpu import cpu_is_supported


def main() -> None:
    """Build for this processor, if the library could run on it."""
    if not cpu_is_supported():
        sys.stdout.write(
            "CPU kernels: this processor has no AVX-512 with bf16 and VNNI, torch will serve\n"
        )
        return
    try:
        sys.stdout.write(f"CPU kernels: {build(Path(sys.argv[1]))}\n")
    except BuildFailed as error:
        sys.stdout.write(f"CPU kernels: torch will serve, because {error}\n")


if __name__ == "__main__":
    main()
