"""The download as a process, against a hub on loopback."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from tests.fakes.fake_hub import FakeHub, Request

HERE = Path(__file__).parent
MODEL_ID = "org/name"
# The library writes what it has in pieces of 10 MiB; this makes two and a bit.
WEIGHTS = random.Random(0).randbytes(24 << 20)
PIECE = 10 << 20
TEXTS = {"config.json": b"{}", "tokenizer.json": b"{}", "generation_config.json": b"{}"}
MODEL = {**TEXTS, "model.safetensors": WEIGHTS}
SMALL = {**TEXTS, "model.safetensors": WEIGHTS[: 1 << 17]}


class Ended(NamedTuple):
    code: int
    stdout: str
    stderr: str

    @property
    def messages(self) -> list[str]:
        return [line.partition("text_generation_server: ")[2] for line in self.stdout.splitlines()]

    @property
    def errors(self) -> list[str]:
        return [line for line in self.stdout.splitlines() if "Z ERROR " in line]


class Downloads:
    """Starts downloads into one cache from one hub."""

    def __init__(self, hub: FakeHub, home: Path) -> None:
        self.hub, self.home = hub, home
        self.repository = home / "hub" / "models--org--name"

    def start(self, *flags: str, **variables: str) -> subprocess.Popen[str]:
        env = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
            "HOME": str(self.home),
            "HF_HOME": str(self.home),
            "HF_ENDPOINT": self.hub.url,
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "FAKE_PAUSE_S": "0.05",
            **variables,
        }
        argv = [sys.executable, str(HERE / "download_fakes.py"), MODEL_ID, *flags]
        return subprocess.Popen(
            argv, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def run(self, *flags: str, **variables: str) -> Ended:
        process = self.start(*flags, **variables)
        stdout, stderr = process.communicate(timeout=60)
        return Ended(process.returncode, stdout, stderr)

    def snapshot(self, revision: str = "main") -> Path:
        return self.repository / "snapshots" / (self.repository / "refs" / revision).read_text()

    def transfers(self) -> list[Request]:
        """The requests for bytes of large files."""
        return self.hub.requests("/cdn/")

    def start_and_stall(self) -> subprocess.Popen[str]:
        """A download that has written the first piece of its weights and gets no more."""
        self.hub.faults.stall_after = PIECE + (2 << 20)
        process = self.start()
        deadline = time.monotonic() + 60
        while not any(self._size(path) >= PIECE for path in self.partials()):
            assert time.monotonic() < deadline, "the download did not get that far"
            time.sleep(0.01)
        return process

    def break_off(self) -> None:
        """Kill a download behind its first piece; the hub is well again."""
        process = self.start_and_stall()
        process.kill()
        process.communicate()
        self.hub.faults.stall_after = None

    def partials(self) -> list[Path]:
        return list(self.repository.glob("blobs/*.incomplete"))

    def _size(self, path: Path) -> int:
        try:
            return path.stat().st_size
        except FileNotFoundError:  # it has arrived
            return 0


@pytest.fixture
def downloads(hub: FakeHub, tmp_path: Path) -> Downloads:
    return Downloads(hub, tmp_path)


Prepare = Callable[[FakeHub], object]


def test_a_model_arrives_and_tgis_lines_say_so(downloads: Downloads) -> None:
    downloads.hub.add(MODEL_ID, {**MODEL, "README.md": b"read me", "modeling.py": b"1/0"})
    started = time.monotonic()
    ended = downloads.run()
    elapsed_s = time.monotonic() - started
    assert (ended.code, ended.stderr) == (0, "")
    path = downloads.snapshot() / "model.safetensors"
    told = re.search(r"in 0:00:(\d\d)\.", ended.messages[1])
    assert told is not None
    assert int(told[1]) <= elapsed_s
    assert ended.messages == [
        "Download file: model.safetensors",
        f"Downloaded {path} in 0:00:{told[1]}.",
        "Download: [1/1] -- ETA: 0",
    ]
    assert {item.name: item.read_bytes() for item in downloads.snapshot().iterdir()} == MODEL
    assert path.is_symlink()


def test_a_second_start_is_one_request(downloads: Downloads) -> None:
    downloads.hub.add(MODEL_ID, SMALL)
    downloads.run()
    downloads.hub.log.clear()
    ended = downloads.run()
    assert ended.messages == ["Files are already present on the host. Skipping download."]
    assert [request.path.partition("?")[0] for request in downloads.hub.log] == [
        "/api/models/org/name"
    ]


def test_python_files_come_only_where_they_are_trusted(downloads: Downloads) -> None:
    downloads.hub.add(MODEL_ID, {**SMALL, "modeling.py": b"1/0"})
    downloads.run()
    assert not (downloads.snapshot() / "modeling.py").exists()
    downloads.run("--trust-remote-code")
    assert (downloads.snapshot() / "modeling.py").exists()
    assert len(downloads.transfers()) == 1


def test_files_there_already_are_not_fetched_again(downloads: Downloads) -> None:
    files = {
        f"model-0000{n}-of-00002.safetensors": WEIGHTS[n << 17 : (n + 1) << 17] for n in (1, 2)
    }
    downloads.hub.add(MODEL_ID, {**TEXTS, **files})
    downloads.run()
    (downloads.snapshot() / "model-00001-of-00002.safetensors").resolve().unlink()
    (downloads.snapshot() / "model-00001-of-00002.safetensors").unlink()
    downloads.hub.log.clear()
    ended = downloads.run()
    assert "File model-00002-of-00002.safetensors already present in cache." in ended.messages
    assert "Download: [1/1] -- ETA: 0" in ended.messages
    assert len(downloads.transfers()) == 1


@pytest.mark.parametrize("name", ["model.safetensors", "generation_config.json"])
def test_a_file_of_another_size_is_fetched_again(downloads: Downloads, name: str) -> None:
    downloads.hub.add(MODEL_ID, SMALL)
    downloads.run()
    (downloads.snapshot() / name).write_bytes(b"x")
    assert downloads.run().code == 0
    assert (downloads.snapshot() / name).read_bytes() == SMALL[name]


def test_what_a_link_out_of_the_cache_leads_to_is_not_removed(
    downloads: Downloads, tmp_path: Path
) -> None:
    downloads.hub.add(MODEL_ID, SMALL)
    downloads.run()
    mine = tmp_path / "mine"
    mine.write_bytes(b"mine")
    (downloads.snapshot() / "model.safetensors").unlink()
    (downloads.snapshot() / "model.safetensors").symlink_to(mine)
    assert downloads.run().code == 0
    assert mine.read_bytes() == b"mine"
    assert (downloads.snapshot() / "model.safetensors").read_bytes() == SMALL["model.safetensors"]


@pytest.mark.parametrize("revision", ["v1", "refs/pr/7"])
def test_a_revision_is_fetched_and_remembered(downloads: Downloads, revision: str) -> None:
    repository = downloads.hub.add(MODEL_ID, SMALL)
    old = repository.refs["main"]
    repository.refs[revision] = old
    repository.commit({"config.json": b'{"new": 1}'})
    assert downloads.run("--revision", revision).code == 0
    assert downloads.snapshot(revision).name == old
    assert (downloads.snapshot(revision) / "config.json").read_bytes() == b"{}"


def test_a_new_commit_brings_only_what_changed(downloads: Downloads) -> None:
    repository = downloads.hub.add(MODEL_ID, SMALL)
    downloads.run()
    sha = repository.commit({"config.json": b'{"new": 1}'})
    downloads.hub.log.clear()
    assert downloads.run().code == 0
    assert downloads.snapshot().name == sha
    assert (downloads.snapshot() / "config.json").read_bytes() == b'{"new": 1}'
    assert (downloads.snapshot() / "model.safetensors").read_bytes() == SMALL["model.safetensors"]
    assert not downloads.transfers()


def test_a_token_opens_a_gated_model_and_goes_to_the_hub_alone(downloads: Downloads) -> None:
    downloads.hub.add(MODEL_ID, SMALL).is_gated = True
    downloads.hub.accounts["hf_good"] = {MODEL_ID}
    assert downloads.run(HF_TOKEN="hf_good").code == 0
    assert {request.token for request in downloads.hub.requests("/resolve/")} == {"hf_good"}
    assert {request.token for request in downloads.transfers()} == {""}


def test_the_old_name_of_the_token_works(downloads: Downloads) -> None:
    downloads.hub.add(MODEL_ID, SMALL).is_private = True
    downloads.hub.accounts["hf_good"] = {MODEL_ID}
    assert downloads.run(HUGGING_FACE_HUB_TOKEN="hf_good").code == 0


def gate(hub: FakeHub) -> None:
    hub.add(MODEL_ID, SMALL).is_gated = True
    hub.accounts["hf_other"] = set()


def hide(hub: FakeHub) -> None:
    hub.add(MODEL_ID, SMALL).is_private = True
    hub.accounts["hf_other"] = set()


@pytest.mark.parametrize(
    ("prepare", "token", "line"),
    [
        (gate, "", "model org/name is gated and nobody without a token may read it"),
        (gate, "hf_other", "gated and the account of the given token may read it"),
        (hide, "", "model org/name does not exist on {url}, or it is private: set HF_TOKEN"),
        (hide, "hf_other", "model org/name does not exist on {url}, or the given token may not"),
        (gate, "hf_bad", "{url} refuses the token (401): check HF_TOKEN"),
    ],
)
def test_a_refusal_says_the_cause_and_what_to_do(
    downloads: Downloads, prepare: Prepare, token: str, line: str
) -> None:
    prepare(downloads.hub)
    ended = downloads.run(HF_TOKEN=token)
    assert ended.code == 1
    assert len(ended.errors) == 1
    assert line.format(url=downloads.hub.url) in ended.errors[0]
    assert "Retry" not in ended.stdout
    assert ended.stderr == ""


def test_a_revision_that_is_missing_is_named(downloads: Downloads) -> None:
    downloads.hub.add(MODEL_ID, SMALL)
    ended = downloads.run("--revision", "v9")
    assert ended.messages == ["model org/name has no revision v9: check --revision"]
    assert ended.code == 1


def test_a_model_without_weights_is_refused_before_anything_is_fetched(
    downloads: Downloads,
) -> None:
    downloads.hub.add(MODEL_ID, {**TEXTS, "training_args.bin": b"x"})
    ended = downloads.run()
    line = "No .safetensors weights found for model org/name and revision None."
    assert (ended.code, ended.messages) == (1, [line])
    assert not downloads.hub.requests("/resolve/")


def test_other_weights_are_the_second_choice(downloads: Downloads) -> None:
    downloads.hub.add(MODEL_ID, {**TEXTS, "pytorch_model.bin": WEIGHTS[: 1 << 17]})
    refused = downloads.run("--no-auto-convert")
    assert refused.code == 1
    ended = downloads.run()
    assert ended.code == 0
    assert ended.messages[0] == (
        "No safetensors weights found for model org/name at revision None. "
        "Downloading PyTorch weights."
    )
    assert (downloads.snapshot() / "pytorch_model.bin").exists()


def test_an_adapter_brings_its_base(downloads: Downloads) -> None:
    adapter = {
        "adapter_config.json": b'{"base_model_name_or_path": "org/base", "revision": "v1"}',
        "adapter_model.safetensors": WEIGHTS[: 1 << 17],
    }
    downloads.hub.add(MODEL_ID, adapter)
    base = downloads.hub.add("org/base", SMALL)
    base.refs["v1"] = base.refs["main"]
    ended = downloads.run()
    assert ended.code == 0
    assert "Downloading parent model org/base" in ended.messages
    assert (downloads.home / "hub" / "models--org--base" / "refs" / "v1").exists()


def test_a_commit_that_is_no_commit_names_no_folder(downloads: Downloads) -> None:
    repository = downloads.hub.add(MODEL_ID, SMALL)
    repository.commits["../../../x"] = repository.commits[repository.refs["main"]]
    repository.refs["main"] = "../../../x"
    ended = downloads.run()
    assert ended.messages[-1] == "the hub names no commit for model org/name"
    assert ended.code == 1
    assert not downloads.repository.exists()


def test_kill_9_in_mid_download_is_resumed(downloads: Downloads) -> None:
    downloads.hub.add(MODEL_ID, MODEL)
    downloads.break_off()
    assert not (downloads.repository / "refs" / "main").exists()
    downloads.hub.log.clear()
    assert downloads.run().code == 0
    assert [request.range for request in downloads.transfers()] == [f"bytes={PIECE}-"]
    assert downloads.transfers()[0].status == 206
    assert (downloads.snapshot() / "model.safetensors").read_bytes() == WEIGHTS
    assert not downloads.partials()


def test_a_server_without_ranges_is_read_from_the_start(downloads: Downloads) -> None:
    downloads.hub.add(MODEL_ID, MODEL)
    downloads.break_off()
    downloads.hub.faults.no_ranges = True
    assert downloads.run().code == 0
    assert (downloads.snapshot() / "model.safetensors").read_bytes() == WEIGHTS


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_download_at_once(downloads: Downloads, number: int) -> None:
    downloads.hub.add(MODEL_ID, MODEL)
    process = downloads.start_and_stall()
    started = time.monotonic()
    process.send_signal(number)
    process.communicate(timeout=5)
    assert time.monotonic() - started < 1


def test_a_cut_connection_is_resumed_where_it_broke(downloads: Downloads) -> None:
    downloads.hub.add(MODEL_ID, MODEL)
    downloads.hub.faults.cut_after, downloads.hub.faults.cuts = PIECE + (2 << 20), 1
    ended = downloads.run()
    assert ended.code == 0
    assert [request.range for request in downloads.transfers()] == ["", f"bytes={PIECE}-"]
    assert (downloads.snapshot() / "model.safetensors").read_bytes() == WEIGHTS


def test_a_busy_hub_is_asked_again(downloads: Downloads) -> None:
    downloads.hub.add(MODEL_ID, SMALL)
    downloads.hub.faults.busy = 2
    ended = downloads.run()
    assert ended.code == 0
    busy = f"the hub at {downloads.hub.url} fails (503 Service Unavailable): try again later"
    pause = "Retrying in 0.05 seconds"
    assert ended.messages[:6] == [busy, pause, "Retry 1/4", busy, pause, "Retry 2/4"]


def test_busy_storage_is_asked_again(downloads: Downloads) -> None:
    downloads.hub.add(MODEL_ID, SMALL)
    downloads.hub.faults.busy_cdn = 2
    ended = downloads.run()
    assert ended.code == 0
    assert ended.messages.count("Retrying in 0.05 seconds") == 2


def test_after_five_attempts_the_cause_is_the_last_word(downloads: Downloads) -> None:
    downloads.hub.add(MODEL_ID, SMALL)
    downloads.hub.faults.busy = 99
    ended = downloads.run()
    assert ended.code == 1
    assert len(downloads.hub.log) == 5
    assert ended.messages[-1].endswith("fails (503 Service Unavailable): try again later")


def test_a_hub_that_is_not_there_is_one_line(downloads: Downloads) -> None:
    ended = downloads.run(HF_ENDPOINT="http://127.0.0.1:9")
    assert ended.code == 1
    assert len(ended.errors) == 1
    assert "cannot reach the hub at http://127.0.0.1:9 (ConnectError: " in ended.errors[0]


@pytest.mark.parametrize("is_resumed", [False, True])
def test_a_wrong_hash_is_refused(downloads: Downloads, is_resumed: bool) -> None:
    downloads.hub.add(MODEL_ID, MODEL)
    if is_resumed:
        downloads.break_off()
    downloads.hub.log.clear()
    downloads.hub.faults.corrupt = True
    ended = downloads.run()
    assert ended.code == 1
    assert "is not what the hub says it is (sha256 differs)" in ended.errors[0]
    assert not downloads.partials()
    assert not list(downloads.repository.glob("snapshots/*/model.safetensors"))
    ranges = [f"bytes={PIECE}-", ""] if is_resumed else [""]
    assert [request.range for request in downloads.transfers()] == ranges


def test_a_part_that_went_bad_on_the_disk_is_replaced(downloads: Downloads) -> None:
    downloads.hub.add(MODEL_ID, MODEL)
    downloads.break_off()
    largest = max(downloads.partials(), key=lambda path: path.stat().st_size)
    largest.write_bytes(b"\0" * PIECE)
    assert downloads.run().code == 0
    assert (downloads.snapshot() / "model.safetensors").read_bytes() == WEIGHTS


def test_a_full_disk_is_said_before_anything_is_fetched(downloads: Downloads) -> None:
    downloads.hub.add(MODEL_ID, MODEL)
    ended = downloads.run(FAKE_FREE_BYTES="20000000")
    cache = downloads.home / "hub"
    assert ended.messages == [
        f"not enough space for model org/name in {cache}: 0.03 GB are needed and 0.02 GB are free"
    ]
    assert ended.code == 1
    assert not downloads.hub.requests("/resolve/")


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_offline_asks_nobody(downloads: Downloads, variable: str) -> None:
    downloads.hub.add(MODEL_ID, SMALL)
    missing = downloads.run(**{variable: "1"})
    assert missing.code == 1
    assert "is not in the hub cache" in missing.errors[0]
    assert not downloads.hub.log
    downloads.run()
    downloads.hub.log.clear()
    assert downloads.run(**{variable: "1"}).code == 0
    assert not downloads.hub.log


def test_without_a_network_the_cache_will_do(downloads: Downloads) -> None:
    downloads.hub.add(MODEL_ID, SMALL)
    downloads.run()
    ended = downloads.run(HF_ENDPOINT="http://127.0.0.1:9")
    assert ended.code == 0
    assert " WARN " in ended.stdout
    assert f"Going on with the cached files of org/name in {downloads.snapshot()}" in ended.stdout
    assert "Retry" not in ended.stdout


def test_a_new_commit_that_cannot_be_had_leaves_the_old_one(downloads: Downloads) -> None:
    repository = downloads.hub.add(MODEL_ID, SMALL)
    old = repository.refs["main"]
    downloads.run()
    repository.commit({"model.safetensors": WEIGHTS[1 << 17 : 2 << 17]})
    downloads.hub.faults.busy_cdn = 99
    ended = downloads.run()
    assert ended.code == 0
    assert "Going on with the cached files of org/name" in ended.stdout
    assert downloads.snapshot().name == old


def test_half_a_model_is_no_reason_to_go_on(downloads: Downloads) -> None:
    downloads.hub.add(MODEL_ID, SMALL)
    downloads.run()
    (downloads.snapshot() / "model.safetensors").unlink()
    assert downloads.run(HF_ENDPOINT="http://127.0.0.1:9").code == 1


def test_the_cache_lies_where_the_variable_says(downloads: Downloads, tmp_path: Path) -> None:
    downloads.hub.add(MODEL_ID, SMALL)
    downloads.run(HUGGINGFACE_HUB_CACHE=str(tmp_path / "other"))
    assert (tmp_path / "other" / "models--org--name" / "refs" / "main").exists()


def test_a_terminal_gets_a_bar_in_place_of_lines(downloads: Downloads) -> None:
    downloads.hub.add(MODEL_ID, SMALL)
    wrapper = "import pty, sys; sys.exit(pty.spawn(sys.argv[1:]) >> 8)"
    argv = [sys.executable, "-c", wrapper, sys.executable, "-m", "kagami_launcher.download"]
    environment = {**os.environ, "HF_HOME": str(downloads.home), "HF_ENDPOINT": downloads.hub.url}
    done = subprocess.run([*argv, MODEL_ID], env=environment, capture_output=True, text=True)
    assert done.returncode == 0
    assert "Download [1/1]: 100%" in done.stdout
    assert "Download file:" not in done.stdout


def test_two_at_a_time_fetch_it_once(downloads: Downloads) -> None:
    downloads.hub.add(MODEL_ID, MODEL)
    processes = [downloads.start() for _ in range(2)]
    for process in processes:
        process.communicate(timeout=60)
    assert [process.returncode for process in processes] == [0, 0]
    assert len(downloads.transfers()) == 1
