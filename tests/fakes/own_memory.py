"""The memory of the tests' own process, as /proc counts it."""

import os
from pathlib import Path


def resident_bytes() -> int:
    """Bytes of the pages that lie in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
