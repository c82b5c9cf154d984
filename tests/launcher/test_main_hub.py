"""The launcher with `--model-id org/name`: a hub on loopback, the real download, fake children."""

import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from tests.fakes.fake_hub import FakeHub

Launch = Callable[..., Any]

WEIGHTS = random.Random(0).randbytes(1 << 17)
MODEL = {
    "config.json": json.dumps({"max_position_embeddings": 256}).encode(),
    "tokenizer.json": b"{}",
    "model.safetensors": WEIGHTS,
}


@pytest.fixture
def variables(hub: FakeHub, tmp_path: Path) -> Mapping[str, str]:
    return {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf")}


@pytest.fixture
def serve(launch: Launch, variables: Mapping[str, str]) -> Launch:
    """Run a launcher until it serves, stop it, and return what it said."""

    def run(*flags: str, **more: str) -> str:
        launcher = launch("--model-id", "org/name", *flags, **{**variables, **more})
        launcher.wait_until_serving()
        launcher.process.send_signal(signal.SIGTERM)
        code, stdout, stderr = launcher.finish()
        assert (code, stderr) == (0, "")
        return str(stdout)

    return run


@pytest.fixture
def fail(launch: Launch, variables: Mapping[str, str]) -> Launch:
    """Run a launcher that cannot start, and return its last line."""

    def run(*flags: str, **more: str) -> str:
        launcher = launch("--model-id", "org/name", *flags, **{**variables, **more})
        code, stdout, stderr = launcher.finish()
        assert code == 1
        assert "Starting shard" not in stdout
        return str(stderr)

    return run


def test_a_model_never_seen_is_downloaded_and_served(
    hub: FakeHub, serve: Launch, tmp_path: Path
) -> None:
    sha = hub.add("org/name", MODEL).refs["main"]
    stdout = serve()
    snapshot = tmp_path / "hf" / "hub" / "models--org--name" / "snapshots" / sha
    said = [
        " INFO download: text_generation_launcher: Starting check and download process for org",
        " INFO text_generation_launcher: Download file: model.safetensors",
        f" INFO text_generation_launcher: Downloaded {snapshot}/model.safetensors in 0:00:0",
        " INFO text_generation_launcher: Download: [1/1] -- ETA: 0\n",
        " INFO download: text_generation_launcher: Successfully downloaded weights for org/name",
        "Starting shard rank=0",
    ]
    positions = [stdout.find(text) for text in said]
    assert -1 not in positions
    assert positions == sorted(positions)


def test_a_second_start_is_one_request(hub: FakeHub, serve: Launch) -> None:
    hub.add("org/name", MODEL)
    serve()
    hub.log.clear()
    stdout = serve()
    assert len(hub.log) == 1
    assert stdout.count("Files are already present on the host. Skipping download.") == 1


@pytest.mark.parametrize("variable", ["", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_a_commit_that_is_there_and_an_offline_start_ask_nobody(
    hub: FakeHub, serve: Launch, variable: str
) -> None:
    sha = hub.add("org/name", MODEL).refs["main"]
    serve()
    hub.log.clear()
    stdout = serve(**{variable: "1"}) if variable else serve("--revision", sha)
    assert hub.log == []
    assert stdout.count("Files are already present on the host. Skipping download.") == 1


def test_offline_and_not_there_is_one_line(hub: FakeHub, fail: Launch, tmp_path: Path) -> None:
    hub.add("org/name", MODEL)
    assert fail(HF_HUB_OFFLINE="1") == (
        'Error: DownloadError("model org/name at revision main is not in the hub cache '
        f"{tmp_path}/hf/hub: run `text-generation-server download-weights org/name` with a "
        'network, or unset HF_HUB_OFFLINE and TRANSFORMERS_OFFLINE")\n'
    )
    assert hub.log == []


def test_without_a_network_the_cache_will_do(hub: FakeHub, serve: Launch) -> None:
    hub.add("org/name", MODEL)
    serve()
    stdout = serve(HF_ENDPOINT="http://127.0.0.1:9")
    assert " WARN text_generation_launcher: cannot reach the hub at http://127.0.0.1:9" in stdout
    assert "Going on with the cached files of org/name" in stdout


@pytest.mark.parametrize("variable", ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_API_TOKEN"])
def test_a_gated_model_is_opened_by_a_token(hub: FakeHub, serve: Launch, variable: str) -> None:
    hub.add("org/name", MODEL).is_gated = True
    hub.accounts["hf_good"] = {"org/name"}
    serve(**{variable: "hf_good"})
    assert {request.token for request in hub.requests("/resolve/")} == {"hf_good"}


def test_a_refusal_is_the_launchers_last_line(hub: FakeHub, fail: Launch) -> None:
    hub.add("org/name", MODEL).is_gated = True
    assert fail() == (
        'Error: DownloadError("model org/name is gated and nobody without a token may read it: '
        f"accept its conditions at {hub.url}/org/name and set HF_TOKEN to a token of that "
        'account")\n'
    )
    assert fail("--model-id", "org/none") == (
        f'Error: DownloadError("model org/none does not exist on {hub.url}, or it is private: '
        'set HF_TOKEN; check --model-id")\n'
    )
    assert fail("--revision", "v9").startswith('Error: DownloadError("model org/name has no rev')


def test_the_cache_lies_where_the_flag_says(hub: FakeHub, serve: Launch, tmp_path: Path) -> None:
    hub.add("org/name", MODEL)
    serve("--huggingface-hub-cache", str(tmp_path / "data"))
    assert (tmp_path / "data" / "models--org--name" / "refs" / "main").is_file()
    assert not (tmp_path / "hf").exists()


def test_a_folder_can_stand_for_the_hub(hub: FakeHub, serve: Launch, model_folder: Path) -> None:
    serve("--weights-cache-override", str(model_folder))
    assert hub.log == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_download(
    hub: FakeHub, launch: Launch, variables: Mapping[str, str], number: int
) -> None:
    hub.add("org/name", MODEL)
    hub.faults.stall_after = 0
    launcher = launch("--model-id", "org/name", **variables)
    launcher.wait_for("Download file: model.safetensors")
    started = time.monotonic()
    launcher.process.send_signal(number)
    code, stdout, stderr = launcher.finish()
    assert (code, stderr) == (0, "")
    assert time.monotonic() - started < 5
    assert stdout.endswith("download terminated\n")


def test_a_download_that_is_killed_is_named(
    hub: FakeHub, launch: Launch, variables: Mapping[str, str]
) -> None:
    hub.add("org/name", MODEL)
    hub.faults.stall_after = 0
    launcher = launch("--model-id", "org/name", **variables)
    launcher.wait_for("Download file: model.safetensors")
    children = Path(f"/proc/{launcher.process.pid}/task/{launcher.process.pid}/children")
    subprocess.run(["kill", "-9", *children.read_text().split()], check=True)
    code, stdout, stderr = launcher.finish()
    assert code == 1
    assert "Download process was signaled to shutdown with signal 9" in stdout
    assert stderr.startswith("Error: DownloadError")


def test_download_weights_works_by_hand(
    hub: FakeHub, variables: Mapping[str, str], tmp_path: Path
) -> None:
    hub.add("org/name", MODEL)
    environment = {**variables, "PATH": "/bin", "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-m", "kagami_shard", "download-weights", "org/name", "--json-output"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    lines = [json.loads(line)["message"] for line in done.stdout.splitlines()]
    assert lines[0] == "Download file: model.safetensors"
    assert (tmp_path / "hf" / "hub" / "models--org--name" / "refs" / "main").is_file()


def test_its_help_is_the_downloads() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "kagami_shard", "download-weights", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    flags = ["--revision", "--extension", "--auto-convert", "--no-auto-convert", "--merge-lora"]
    flags += ["--logger-level", "--json-output", "--trust-remote-code"]
    assert all(flag in done.stdout for flag in flags)
