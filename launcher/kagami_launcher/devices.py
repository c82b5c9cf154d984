"""What this machine computes on: GPUs that a shard may use, else the CPU.

Reads the machine, not the launcher's own environment: that comes in as a mapping.
"""

import shutil
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from kagami_proto.values import DEVICE_POLICIES, DevicePolicy

# In TGI's order: the first that is set counts.
DEVICE_VARIABLES = ("CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "ZE_AFFINITY_MASK")


@dataclass(frozen=True, slots=True)
class Devices:
    """What the machine offers: GPUs that a shard may use, and the name of their kind."""

    num_cuda: int
    card: str = ""  # nvidia-smi's name in lower case with dashes; empty = unknown
    num_listed: int | None = None  # by the variables that choose devices; None = none is set

    @property
    def policy(self) -> DevicePolicy:
        """How shards on these devices want to be used; before any of them can say so itself."""
        return DEVICE_POLICIES["cuda" if self.num_cuda else "cpu"]

    def compute_type(self, num_shard: int) -> str:
        """What goes out in the `x-compute-type` header."""
        return f"{num_shard}-{self.card or 'cuda'}" if self.num_cuda else f"{num_shard}-cpu"


def find_devices(base: Mapping[str, str]) -> Devices:
    """The CUDA devices a shard would see. torch is not asked: importing it takes seconds."""
    cards = [name for name in _ask_nvidia_smi(base).splitlines() if name.strip()]
    present = len(cards) or sum(
        path.name.removeprefix("nvidia").isdecimal() for path in Path("/dev").glob("nvidia*")
    )
    num_listed = _num_listed(base, present)
    visible = base.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        present = min(present, _num_visible(visible))
    card = cards[0].strip().lower().replace(" ", "-") if cards and present else ""
    return Devices(present, card, num_listed)


def _num_listed(base: Mapping[str, str], present: int) -> int | None:
    """How many devices the first of these variables lists, by TGI's rule: its commas count.

    `all`, which the container toolkit sets, and `void` mean the cards that nvidia-smi finds.
    """
    for name in DEVICE_VARIABLES:
        if (value := base.get(name)) is not None:
            is_all = name == "NVIDIA_VISIBLE_DEVICES" and value.strip() in ("all", "void")
            return present if is_all else len(value.split(","))
    return None


def _num_visible(value: str) -> int:
    """CUDA counts the entries up to the first invalid one; -1 and an empty list hide all."""
    count = 0
    for entry in value.split(","):
        if not entry.strip() or entry.strip() == "-1":
            break
        count += 1
    return count


def _ask_nvidia_smi(base: Mapping[str, str]) -> str:
    return (
        command_output(["nvidia-smi", "--query-gpu=gpu_name", "--format=csv,noheader"], base) or ""
    )


def command_output(argv: list[str], base: Mapping[str, str]) -> str | None:
    """What a command prints, or None if it is missing, fails or takes longer than 10 s."""
    if (path := shutil.which(argv[0], path=base.get("PATH"))) is None:
        return None
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(
            [path, *argv[1:]], capture_output=True, text=True, timeout=10, check=True
        )
        return done.stdout
    return None
