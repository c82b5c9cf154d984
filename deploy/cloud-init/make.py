"""Writes the cloud-init files: the template oci.yaml.in with the unit in it, once for each shape.

python deploy/cloud-init/make.py          a test keeps the written files in step
"""

import textwrap
from collections.abc import Mapping
from pathlib import Path

HERE = Path(__file__).parent
UNIT = HERE.parent / "systemd" / "kagami.service"

SHAPES: Mapping[str, Mapping[str, str]] = {
    "oci-cpu.yaml": {
        "@SHAPE@": "without a GPU (VM.Standard.E5.Flex, VM.Standard3.Flex, VM.Optimized3.Flex)",
        "@TORCH_INDEX@": "https://download.pytorch.org/whl/cpu",
        "@MODEL_ID@": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "@PACKAGES@": "",
        "@DRIVER@": "",
    },
    "oci-a10.yaml": {
        "@SHAPE@": "with an A10 (VM.GPU.A10.1, VM.GPU.A10.2)",
        "@TORCH_INDEX@": "https://download.pytorch.org/whl/cu128",
        "@MODEL_ID@": "HuggingFaceTB/SmolLM2-1.7B-Instruct",
        "@PACKAGES@": "  - ubuntu-drivers-common\n",
        # The service starts after the reboot that loads the driver.
        "@DRIVER@": "  - ubuntu-drivers install --gpgpu\n",
    },
}
_REBOOT = "power_state:\n  mode: reboot\n  message: The driver of the GPU is loaded by a reboot.\n"


def render(name: str) -> str:
    """The text of one file."""
    text = (HERE / "oci.yaml.in").read_text()
    for mark, value in SHAPES[name].items():
        text = text.replace(mark + "\n", value) if mark in ("@PACKAGES@", "@DRIVER@") else text
        text = text.replace(mark, value)
    text = text.replace("@UNIT@\n", textwrap.indent(UNIT.read_text(), " " * 6, lambda _: True))
    lines = [line.rstrip() for line in text.splitlines()]
    return "\n".join(lines) + "\n" + (_REBOOT if SHAPES[name]["@DRIVER@"] else "")


def main() -> None:
    for name in SHAPES:
        (HERE / name).write_text(render(name))


if __name__ == "__main__":
    main()
