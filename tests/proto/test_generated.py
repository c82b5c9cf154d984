"""The committed protobuf code is what the Makefile's protoc line makes of generate.proto."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GENERATED = sorted((ROOT / "proto" / "kagami_proto").glob("*_pb2*.py*"))


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with newly generated code."""
    pytest.importorskip("grpc_tools")
    folder = tmp_path_factory.mktemp("generated")
    recipe = re.search(
        r"^proto:.*\n\tcd proto && ((?:.*\\\n)*.*)$", (ROOT / "Makefile").read_text(), re.M
    )
    assert recipe, "the Makefile has no target proto"
    command = recipe[1].replace("\\\n", " ").replace("../$(BIN)/python", sys.executable)
    command = command.replace("../$(BIN)", str(Path(sys.executable).parent))
    command = re.sub(r"(_out)=\.", rf"\1={folder}", command)
    subprocess.run(command, shell=True, cwd=ROOT / "proto", check=True, env=dict(os.environ))
    return folder / "kagami_proto"


def test_there_is_generated_code() -> None:
    assert [path.name for path in GENERATED] == [
        "generate_pb2.py",
        "generate_pb2.pyi",
        "generate_pb2_grpc.py",
        "generate_pb2_grpc.pyi",
    ]


@pytest.mark.parametrize("path", GENERATED, ids=lambda path: path.name)
def test_the_committed_code_is_fresh(fresh: Path, path: Path) -> None:
    assert path.read_bytes() == (fresh / path.name).read_bytes(), "run `make proto`"
