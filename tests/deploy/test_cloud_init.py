"""The cloud-init files: made of the template and the unit, and valid by cloud-init's own schema."""

import runpy
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

DEPLOY = Path(__file__).parents[2] / "deploy"
FOLDER = DEPLOY / "cloud-init"
NAMES = ("oci-cpu.yaml", "oci-a10.yaml")


def written(name: str) -> dict[str, Any]:
    """The files that the machine gets, by path."""
    config = yaml.safe_load((FOLDER / name).read_text())
    return {one["path"]: one["content"] for one in config["write_files"]}


@pytest.mark.parametrize("name", NAMES)
def test_a_file_is_what_the_template_makes(name: str) -> None:
    assert runpy.run_path(str(FOLDER / "make.py"))["render"](name) == (FOLDER / name).read_text()


@pytest.mark.parametrize("name", NAMES)
def test_the_unit_in_it_is_ours(name: str) -> None:
    unit = (DEPLOY / "systemd" / "kagami.service").read_text()
    assert written(name)["/etc/systemd/system/kagami.service"] == unit


@pytest.mark.parametrize("name", NAMES)
def test_its_script_is_a_shell_script(name: str) -> None:
    script = written(name)["/usr/local/sbin/install-kagami"]
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.skipif(not shutil.which("cloud-init"), reason="is in Debian's package cloud-init")
def test_cloud_init_takes_it(name: str) -> None:
    command = ["cloud-init", "schema", "--config-file", str(FOLDER / name)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
