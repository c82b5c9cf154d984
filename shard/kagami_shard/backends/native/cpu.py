"""What the processor can, from /proc/cpuinfo: asked before there is a library to ask."""

from pathlib import Path

_NEEDED = frozenset({"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16", "avx512_vnni"})


def cpu_is_supported(cpuinfo: Path = Path("/proc/cpuinfo")) -> bool:
    """Whether the library's instructions are all there."""
    try:
        text = cpuinfo.read_text(encoding="ascii", errors="replace")
    except OSError:
        return False
    flags = next((line for line in text.splitlines() if line.startswith("flags")), "")
    return _NEEDED.issubset(flags.split())
