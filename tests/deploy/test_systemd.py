"""The unit file: systemd finds nothing wrong with it, and little that it lets the service do."""

import configparser
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from kagami_launcher.cli import flags

SYSTEMD = Path(__file__).parents[2] / "deploy" / "systemd"
UNIT = SYSTEMD / "kagami.service"
# 0 is a service that may do nothing, 10 one that may do all.
MOST_EXPOSED = 2.0
needs_systemd = pytest.mark.skipif(
    not shutil.which("systemd-analyze"), reason="systemd-analyze is in Debian's package systemd"
)


def analyze(*words: str) -> str:
    done = subprocess.run(["systemd-analyze", *words], capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def service() -> configparser.SectionProxy:
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]  # names keep their case
    unit.read(UNIT)
    return unit["Service"]


@needs_systemd
def test_systemd_finds_nothing_wrong(tmp_path: Path) -> None:
    # The command has to be there, so here it is one that is.
    unit = tmp_path / UNIT.name
    unit.write_text(re.sub(r"(?m)^ExecStart=\S+", "ExecStart=/bin/true", UNIT.read_text()))
    assert analyze("verify", "--man=no", str(unit)) == ""


@needs_systemd
def test_the_service_may_do_little() -> None:
    answer = analyze("security", "--offline=true", "--no-pager", str(UNIT))
    found = re.search(r"Overall exposure level for kagami.service: ([\d.]+)", answer)
    assert found is not None, answer
    assert float(found[1]) <= MOST_EXPOSED


def test_systemd_waits_for_ready_and_watches(service: configparser.SectionProxy) -> None:
    assert (service["Type"], service["NotifyAccess"]) == ("notify", "main")
    assert int(service["WatchdogSec"]) > 0


def test_a_drain_ends_before_systemd_kills(service: configparser.SectionProxy) -> None:
    drain_s = next(item.default for item, _ in flags() if item.name.startswith("graceful"))
    assert int(service["TimeoutStopSec"]) > drain_s
    assert service["KillMode"] == "mixed"


def test_every_variable_of_the_example_is_a_flag() -> None:
    names = re.findall(r"(?m)^#? ?([A-Z_]+)=", (SYSTEMD / "kagami.env").read_text())
    known = {item.name.upper() for item, _ in flags()} | {"HF_TOKEN"}
    assert names
    assert set(names) <= known
