"""The launcher as a process, with fake children that are processes too."""

import json
import os
import re
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kagami_launcher.process_tree import rust_duration
from kagami_proto.logs import MAX_MESSAGE

Launch = Callable[..., Any]


def is_alive(pid: int) -> bool:
    """Whether the process runs; one that only waits to be reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until_dead(pids: list[int]) -> None:
    deadline = time.monotonic() + 10
    while any(is_alive(pid) for pid in pids):
        assert time.monotonic() < deadline, f"of {pids} some are alive"
        time.sleep(0.02)


def messages(stdout: str) -> list[str]:
    """The log without times, one entry a line."""
    return [line.split("Z ", 1)[-1].strip() for line in stdout.splitlines()]


def test_start_up_says_what_operators_wait_for_in_order(launch: Launch) -> None:
    launcher = launch()
    launcher.wait_until_serving()
    launcher.process.send_signal(signal.SIGTERM)
    code, stdout, stderr = launcher.finish()
    assert (code, stderr) == (0, "")
    said = [
        "Args {",
        "INFO download: text_generation_launcher: Starting check and download process for",
        "Files are already present on the host. Skipping download.",
        "INFO download: text_generation_launcher: Successfully downloaded weights for",
        "Default `max_batch_prefill_tokens` to 256",
        "INFO shard-manager: text_generation_launcher: Starting shard rank=0",
        "INFO text_generation_launcher: Server started at unix://",
        "INFO shard-manager: text_generation_launcher: Shard ready in ",
        "INFO text_generation_launcher: Starting Webserver",
        "INFO text_generation_router: Connected",
        "Terminating webserver",
        "Waiting for webserver to gracefully shutdown",
        "webserver terminated",
        "Shutting down shards",
        "Terminating shard",
        "shard terminated",
    ]
    positions = [stdout.find(text) for text in said]
    assert -1 not in positions
    assert positions == sorted(positions)
    assert re.search(r"Shard ready in [\d.]+m?s rank=0\n", stdout)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_every_stop_signal_ends_router_then_shard(launch: Launch, number: int) -> None:
    launcher = launch()
    launcher.wait_until_serving()
    launcher.process.send_signal(number)
    code, _, _ = launcher.finish()
    assert code == 0
    assert launcher.happened() == ["shard-start", "router-start", "router-end", "shard-end"]


def test_kill_9_leaves_no_orphan(launch: Launch) -> None:
    launcher = launch(FAKE_ROUTER="deaf")
    launcher.wait_until_serving()
    launcher.process.send_signal(signal.SIGKILL)
    wait_until_dead(launcher.child_pids())


def test_sigterm_in_the_instant_of_a_start_is_not_lost(launch: Launch) -> None:
    launcher = launch(FAKE_SHARD="deaf")
    launcher.wait_for("Starting shard")
    launcher.process.send_signal(signal.SIGTERM)
    assert launcher.finish(timeout_s=5)[0] == 0


@pytest.mark.parametrize("mode", ["hang", "deaf"])
def test_sigterm_while_the_shard_loads_ends_everything_soon(launch: Launch, mode: str) -> None:
    launcher = launch(FAKE_SHARD=mode)
    launcher.wait_for("Loading")
    started = time.monotonic()
    launcher.process.send_signal(signal.SIGTERM)
    code, stdout, stderr = launcher.finish()
    assert (code, stderr) == (0, "")
    assert time.monotonic() - started < 5
    assert stdout.endswith("shard killed\n" if mode == "deaf" else "shard terminated\n")


def test_a_router_that_does_not_end_is_killed_after_the_grace_time(launch: Launch) -> None:
    launcher = launch("--graceful-termination-timeout", "1", FAKE_ROUTER="deaf")
    launcher.wait_until_serving()
    launcher.process.send_signal(signal.SIGTERM)
    code, stdout, _ = launcher.finish()
    assert code == 0
    assert "Killing webserver\n" in stdout
    assert "webserver killed\n" in stdout
    assert launcher.happened()[-1] == "shard-end"


def test_a_second_ctrl_c_does_not_wait(launch: Launch) -> None:
    launcher = launch(FAKE_ROUTER="deaf")
    launcher.wait_until_serving()
    launcher.process.send_signal(signal.SIGINT)
    launcher.wait_for("Waiting for webserver")
    launcher.process.send_signal(signal.SIGINT)
    assert launcher.finish()[0] == 0


def test_a_shard_that_dies_while_loading_has_the_last_word(launch: Launch) -> None:
    code, stdout, stderr = launch(FAKE_SHARD="die").finish()
    assert (code, stderr) == (1, "Error: ShardCannotStart\n")
    assert "Shard 0 failed to start" in stdout
    assert "WARN text_generation_launcher: RuntimeError: no weight for you rank=0" in stdout
    assert messages(stdout)[-1].endswith("Last error of the shard: RuntimeError: no weight for you")


def test_a_shard_that_crashes_takes_the_router_down(launch: Launch) -> None:
    launcher = launch(FAKE_SHARD="crash")
    code, stdout, stderr = launcher.finish()
    assert (code, stderr) == (1, "Error: ShardFailed\n")
    assert "Shard process was signaled to shutdown with signal 9" in stdout
    assert "Shard 0 crashed" in stdout
    assert "router-end" in launcher.happened()
    assert messages(stdout)[-1].endswith(
        "Last error of the shard: it was signaled to shutdown with signal 9 (out of memory?)"
    )


def test_a_router_that_loses_its_shard_is_not_blamed(launch: Launch) -> None:
    code, stdout, stderr = launch(FAKE_SHARD="fail", FAKE_ROUTER="lose").finish()
    assert (code, stderr) == (1, "Error: ShardFailed\n")
    assert "Shard 0 crashed" in stdout
    assert "Webserver Crashed" not in stdout
    assert messages(stdout)[-1].endswith("Last error of the shard: the GPU is lost")


def test_a_router_that_cannot_bind_shows_its_own_error(launch: Launch) -> None:
    launcher = launch(FAKE_ROUTER="busy")
    code, stdout, stderr = launcher.finish()
    assert (code, stderr) == (1, "Error: WebserverFailed\n")
    assert (
        "ERROR text_generation_router: Error: Axum webserver failed: Address already in use\n"
        in stdout
    )
    assert "Webserver Crashed" in stdout
    assert launcher.happened()[-1] == "shard-end"


def test_a_router_that_leaves_politely_is_a_failure_too(launch: Launch) -> None:
    code, _, stderr = launch(FAKE_ROUTER="leave").finish()
    assert (code, stderr) == (1, "Error: WebserverFailed\n")


def test_a_shard_that_never_gets_ready_is_given_up(launch: Launch) -> None:
    launcher = launch(FAKE_SHARD="hang", KAGAMI_STARTUP_TIMEOUT="1")
    code, stdout, stderr = launcher.finish()
    assert (code, stderr) == (1, "Error: ShardCannotStart\n")
    assert "Shard 0 is not ready after 1 s" in stdout


def test_a_long_load_is_not_silent(launch: Launch) -> None:
    launcher = launch(FAKE_SHARD="hang", FAKE_WAITING_S="0.2")
    line = " INFO shard-manager: text_generation_launcher: Waiting for shard to be ready... rank=0"
    launcher.wait_for(line)


def test_a_reader_that_goes_away_is_no_reason_to_stop(launch: Launch) -> None:
    launcher = launch()
    launcher.wait_until_serving()
    launcher.process.stdout.close()
    launcher.process.send_signal(signal.SIGTERM)
    assert launcher.process.wait(timeout=10) == 0
    assert launcher.process.stderr.read() == b""
    assert launcher.happened()[-1] == "shard-end"


def test_lines_are_forwarded_whole(launch: Launch) -> None:
    launcher = launch(FAKE_ROUTER="talk")
    launcher.wait_for("Connected")
    launcher.process.send_signal(signal.SIGTERM)
    _, stdout, _ = launcher.finish()
    cut = f"{'x' * MAX_MESSAGE}… (300000 characters)"
    assert f" WARN text_generation_router: {cut}\n" in stdout
    assert " INFO text_generation_router: no json on stdout\n" in stdout
    assert " WARN text_generation_router: no json on stderr\n" in stdout


def test_json_output_is_json_in_every_line(launch: Launch) -> None:
    launcher = launch("--json-output", FAKE_ROUTER="talk")
    launcher.wait_for('"message":"Connected"')
    launcher.process.send_signal(signal.SIGTERM)
    _, stdout, _ = launcher.finish()
    lines = [json.loads(line) for line in stdout.splitlines()]
    assert all({"timestamp", "level", "target", "message", "fields"} <= set(line) for line in lines)
    shards = [line for line in lines if line["message"].startswith("Server started")]
    assert shards[0]["fields"]["rank"] == 0
    assert shards[0]["target"] == "text_generation_launcher"


def test_the_log_level_holds_for_the_children_too(launch: Launch) -> None:
    launcher = launch(FAKE_ROUTER="talk", LOG_LEVEL="warn")
    launcher.wait_for("xxx… (300000 characters)\n")
    launcher.process.send_signal(signal.SIGTERM)
    _, stdout, _ = launcher.finish()
    assert " INFO " not in stdout


def test_a_busy_port_is_said_before_any_work(launch: Launch) -> None:
    with socket.create_server(("0.0.0.0", 0)) as listener:
        port = str(listener.getsockname()[1])
        launcher = launch("--port", port)
        code, stdout, stderr = launcher.finish()
    assert code == 1
    line = f'Error: WebserverCannotStart("port {port} of 0.0.0.0 is already in use")\n'
    assert stderr == line
    assert "Starting shard" not in stdout


def test_an_unsupported_flag_is_refused_before_any_work(launch: Launch) -> None:
    code, stdout, stderr = launch(SPECULATE="2").finish()
    assert (code, stdout.splitlines()[-1]) == (1, "}")
    assert stderr == 'Error: ArgumentValidation("--speculate 2 is not supported yet")\n'


def test_a_flag_without_effect_is_one_warning(launch: Launch) -> None:
    launcher = launch("--model-id", "/none", ROPE_FACTOR="2")
    code, stdout, stderr = launcher.finish()
    assert (code, stderr) == (1, 'Error: DownloadError("/none does not exist")\n')
    assert stdout.count(" WARN text_generation_launcher: `--rope-factor` has no effect: ") == 1


def test_a_broken_index_is_one_clear_line(launch: Launch, model_folder: Path) -> None:
    index = model_folder / "model.safetensors.index.json"
    index.write_text("{}")
    code, _, stderr = launch().finish()
    why = f"cannot read {index}: no weight_map of tensors to files: "
    assert (code, stderr.count("\n")) == (1, 1)
    assert stderr.startswith(f'Error: DownloadError("{why}')


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_pipe_in_the_place_of_a_file_is_not_waited_for(
    launch: Launch, model_folder: Path, name: str
) -> None:
    (model_folder / name).unlink()
    os.mkfifo(model_folder / name)
    code, _, stderr = launch().finish()
    assert code == 1
    assert stderr.count("\n") == 1
    assert str(model_folder) in stderr


def test_the_report_comes_before_the_arguments(launch: Launch) -> None:
    _, stdout, _ = launch("--env", "--model-id", "/none").finish()
    assert "Runtime environment:" in stdout.splitlines()[0]
    assert stdout.index("nvidia-smi:") < stdout.index("Args {")


def free_port() -> str:
    with socket.create_server(("localhost", 0)) as listener:
        return str(listener.getsockname()[1])


def test_shards_start_together_and_stop_after_the_router(launch: Launch) -> None:
    launcher = launch("--num-shard", "3", "--master-port", free_port(), FAKE_NUM_SHARD="3")
    launcher.wait_until_serving()
    launcher.process.send_signal(signal.SIGTERM)
    code, stdout, stderr = launcher.finish()
    assert (code, stderr) == (0, "")
    assert "Sharding model on 3 processes\n" in stdout
    ready = [stdout.index(f"s rank={rank}\n", stdout.index("Shard ready in")) for rank in range(3)]
    started = [stdout.index(f"Starting shard rank={rank}\n") for rank in range(3)]
    assert max(started) < min(ready) < max(ready) < stdout.index("Starting Webserver")
    assert launcher.happened() == [
        *["shard-start"] * 3,
        "router-start",
        "router-end",
        *["shard-end"] * 3,
    ]


@pytest.mark.parametrize(
    ("mode", "error", "line"),
    [
        ("die", "ShardCannotStart", "Shard 1 failed to start"),
        ("crash", "ShardFailed", "Shard 1 crashed"),
    ],
)
def test_one_dead_shard_of_several_is_named_and_ends_the_tree(
    launch: Launch, mode: str, error: str, line: str
) -> None:
    launcher = launch("--num-shard", "2", "--master-port", free_port(), FAKE_SHARD_1=mode)
    code, stdout, stderr = launcher.finish()
    assert (code, stderr) == (1, f"Error: {error}\n")
    assert line in stdout
    wait_until_dead(launcher.child_pids())


def test_a_router_that_waits_for_a_dead_shard_is_not_heard_of(launch: Launch) -> None:
    launcher = launch(FAKE_SHARD="die")
    _, stdout, _ = launcher.finish()
    assert "ebserver" not in stdout.partition("Args {")[2].partition("}\n")[2]
    assert not any(is_alive(pid) for pid in launcher.child_pids())


@pytest.mark.slow
def test_a_stuck_shard_does_not_keep_a_broken_tree_alive(launch: Launch) -> None:
    modes = {"FAKE_SHARD_0": "stuck", "FAKE_SHARD_1": "crash", "FAKE_ROUTER": "deaf"}
    launcher = launch("--num-shard", "2", "--master-port", free_port(), **modes)
    code, stdout, stderr = launcher.finish(timeout_s=30)  # not two times 90 s
    assert (code, stderr) == (1, "Error: ShardFailed\n")
    assert "webserver killed" in stdout
    assert "shard killed" in stdout
    wait_until_dead(launcher.child_pids())


def test_a_shard_that_is_not_ready_is_the_one_named(launch: Launch) -> None:
    options = {"FAKE_SHARD_1": "hang", "KAGAMI_STARTUP_TIMEOUT": "4"}
    code, stdout, _ = launch("--num-shard", "2", "--master-port", free_port(), **options).finish()
    assert code == 1
    assert "Shard 1 is not ready after 4 s" in stdout


def test_a_busy_master_port_is_said_before_any_work(launch: Launch) -> None:
    with socket.create_server(("localhost", 0)) as listener:
        port = str(listener.getsockname()[1])
        code, stdout, stderr = launch("--num-shard", "2", "--master-port", port).finish()
    assert code == 1
    assert stderr == (
        f'Error: ShardCannotStart("port {port} of localhost is already in use: choose another '
        '--master-port for the shards")\n'
    )
    assert "Starting shard" not in stdout


def test_the_devices_are_counted_when_sharding_is_asked_for(launch: Launch) -> None:
    code, stdout, stderr = launch("--sharded", "true", CUDA_VISIBLE_DEVICES="0").finish()
    assert code == 1
    assert stderr == (
        'Error: NotEnoughCUDADevices("`sharded` is true but only found 1 CUDA devices")\n'
    )
    assert (
        "Parsing num_shard from CUDA_VISIBLE_DEVICES/NVIDIA_VISIBLE_DEVICES/ZE_AFFINITY_MASK"
        in stdout
    )


@pytest.mark.parametrize(
    ("variable", "command", "error"),
    [
        ("FAKE_SERVER", "text-generation-server", "ShardCannotStart"),
        ("FAKE_WEB", "text-generation-router", "WebserverCannotStart"),
    ],
)
def test_a_missing_command_is_named(
    launch: Launch, variable: str, command: str, error: str
) -> None:
    code, stdout, stderr = launch(**{variable: ""}).finish()
    assert (code, stderr) == (1, f"Error: {error}\n")
    assert f"{command} not found in PATH" in stdout


def test_a_relative_socket_path_serves_too(launch: Launch, tmp_path: Path) -> None:
    launcher = launch("--shard-uds-path", "relative")
    launcher.wait_until_serving()
    assert (tmp_path / "relative-0").is_socket()


def test_two_launchers_never_share_a_shard(launch: Launch, tmp_path: Path) -> None:
    first = launch(FAKE_SHARD="hang")
    first.wait_for("Loading")
    code, stdout, stderr = launch().finish()
    assert code == 1
    assert stderr == (
        f'Error: ShardCannotStart("another launcher uses {tmp_path}/uds-0: '
        'choose another --shard-uds-path")\n'
    )
    assert "Starting shard" not in stdout
    assert first.process.poll() is None


def test_a_killed_launcher_keeps_nobody_from_its_socket(launch: Launch) -> None:
    killed = launch()
    killed.wait_until_serving()
    killed.process.send_signal(signal.SIGKILL)
    wait_until_dead(killed.child_pids())
    launch().wait_until_serving()


def test_a_stale_socket_is_no_obstacle(launch: Launch, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(tmp_path / "uds-0"))
    launcher = launch()
    launcher.wait_until_serving()


@pytest.mark.parametrize(
    ("nanoseconds", "text"),
    [(9_107_832_275, "9.107832275s"), (987_654_321, "987.654321ms"), (12_000_000_000, "12s")],
)
def test_a_duration_has_the_form_of_rust(nanoseconds: int, text: str) -> None:
    assert rust_duration(nanoseconds) == text
