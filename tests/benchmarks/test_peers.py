from pathlib import Path

import pytest
from tests.benchmarks.side_by_side.groups import GROUPS
from tests.benchmarks.side_by_side.peers import PEERS, Installed, find


def install(root: Path, name: str, *, model: str = "m") -> None:
    """Empty files where a peer's program and model are looked for."""
    peer = PEERS[name]
    for path in (root / peer.program, root / peer.model.format(name=model)):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def installed(root: Path, name: str) -> Installed:
    install(root, name)
    ((found,), _) = find(root, "m", [name])
    return found


@pytest.mark.parametrize("name", PEERS)
def test_a_peer_with_program_and_model_is_found(name: str, tmp_path: Path) -> None:
    install(tmp_path, name)

    found, lacking = find(tmp_path, "m", [name])

    assert [one.peer.name for one in found] == [name]
    assert lacking == []


def test_an_empty_folder_has_no_peers_and_says_what_is_missing(tmp_path: Path) -> None:
    found, lacking = find(tmp_path, "m", ["llamacpp-q4_0"])

    assert found == []
    assert lacking == ["llamacpp-q4_0 was not measured: no llama-server and no m-Q4_0.gguf"]


def test_a_peer_without_this_model_is_not_found(tmp_path: Path) -> None:
    install(tmp_path, "openvino-bf16", model="another")

    found, lacking = find(tmp_path, "m", ["openvino-bf16"])

    assert found == []
    assert lacking == ["openvino-bf16 was not measured: no m-ov-fp16"]


@pytest.mark.parametrize("name", PEERS)
def test_a_command_has_its_values_and_listens_on_loopback_only(name: str, tmp_path: Path) -> None:
    peer = installed(tmp_path, name)

    command = peer.command(port=1234, num_threads=2)

    assert command[0] == str(peer.program)
    assert {str(peer.model), "1234"} <= {*command}
    assert not [part for part in command if "{" in part or "0.0.0.0" in part]


def test_vllm_computes_on_all_cores(tmp_path: Path) -> None:
    environment = installed(tmp_path, "vllm-bf16").environment({}, cores={3, 2})

    assert environment["VLLM_CPU_OMP_THREADS_BIND"] == "2,3"


def test_libraries_are_loaded_first_where_they_are(tmp_path: Path) -> None:
    peer = installed(tmp_path, "vllm-bf16")
    library = tmp_path / "vllm" / "lib" / "libiomp5.so"

    assert str(library) not in peer.environment({}, cores={0, 1}).get("LD_PRELOAD", "")
    library.parent.mkdir()
    library.touch()
    assert str(library) in peer.environment({}, cores={0, 1})["LD_PRELOAD"]


def test_our_own_modules_are_not_shown_to_peers(tmp_path: Path) -> None:
    peer = installed(tmp_path, "openvino-bf16")

    environment = peer.environment({"PYTHONPATH": "/ours", "HOME": "/home"}, cores={0, 1})

    assert "PYTHONPATH" not in environment
    assert environment["HOME"] == "/home"


def test_a_peers_own_programs_are_found_first(tmp_path: Path) -> None:
    environment = installed(tmp_path, "vllm-bf16").environment({"PATH": "/bin"}, cores={0, 1})

    assert environment["PATH"] == f"{tmp_path / 'vllm' / 'bin'}:/bin"


def test_every_peer_is_in_one_group() -> None:
    named = [name for group in GROUPS.values() for name in group.peers]

    assert sorted(named) == sorted(PEERS)


@pytest.mark.parametrize("name", GROUPS)
def test_no_peer_is_measured_where_we_are_not(name: str) -> None:
    group = GROUPS[name]

    assert all({*workloads} <= {*group.workloads} for workloads in group.peers.values())
