"""An `nvidia-smi` that prints what a test wants."""

from pathlib import Path


def fake_nvidia_smi(folder: Path, *cards: str) -> str:
    """Write it; returns its folder, for PATH."""
    script = folder / "nvidia-smi"
    script.write_text("#!/bin/sh\n" + "".join(f"echo '{card}'\n" for card in cards))
    script.chmod(0o755)
    return str(folder)
