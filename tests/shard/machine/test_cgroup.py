from pathlib import Path

import pytest

from kagami_shard.machine import cgroup

GIB = 1 << 30


class Groups:
    """A cgroup v2 hierarchy, and a process in its group `unit`."""

    def __init__(self, folder: Path, name: str = "/system.slice/unit") -> None:
        self.root = folder / "cgroup"
        self.own = folder / "own"
        self.own.write_text(f"4:memory:/elsewhere\n0::{name}\n")

    def write(self, group: str, **files: str) -> None:
        folder = self.root / group
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            (folder / name.replace("_", ".")).write_text(text)

    def available_bytes(self) -> int | None:
        return cgroup.available_bytes(self.root, self.own)

    def num_cores(self) -> int | None:
        return cgroup.num_cores(self.root, self.own)


@pytest.fixture
def groups(tmp_path: Path) -> Groups:
    return Groups(tmp_path)


def test_without_a_hierarchy_nothing_is_limited(groups: Groups) -> None:
    assert groups.available_bytes() is None
    assert groups.num_cores() is None


def test_max_is_no_limit(groups: Groups) -> None:
    groups.write("system.slice/unit", memory_max="max\n", memory_current=f"{GIB}\n")
    groups.write("system.slice/unit", cpu_max="max 100000\n")
    assert groups.available_bytes() is None
    assert groups.num_cores() is None


def test_the_smallest_limit_from_the_own_group_to_the_root_holds(groups: Groups) -> None:
    groups.write("system.slice/unit", memory_max=f"{8 * GIB}\n", memory_current=f"{GIB}\n")
    groups.write("system.slice", memory_max=f"{6 * GIB}\n", memory_current=f"{2 * GIB}\n")
    groups.write("system.slice/unit", cpu_max="400000 100000\n")
    groups.write(".", cpu_max="800000 100000\n")
    assert groups.available_bytes() == 4 * GIB
    assert groups.num_cores() == 4


def test_files_that_were_read_once_leave_their_memory(groups: Groups) -> None:
    groups.write(
        "system.slice/unit",
        memory_max=f"{8 * GIB}\n",
        memory_current=f"{8 * GIB}\n",
        memory_stat=f"anon {6 * GIB}\ninactive_file {2 * GIB}\nactive_file 0\n",
    )
    assert groups.available_bytes() == 2 * GIB


def test_more_than_the_limit_leaves_nothing(groups: Groups) -> None:
    groups.write("system.slice/unit", memory_max=f"{GIB}\n", memory_current=f"{2 * GIB}\n")
    assert groups.available_bytes() == 0


@pytest.mark.parametrize(("quota", "cores"), [(150_000, 2), (50_000, 1), (200_000, 2)])
def test_a_part_of_a_core_counts_as_one(groups: Groups, quota: int, cores: int) -> None:
    groups.write("system.slice/unit", cpu_max=f"{quota} 100000\n")
    assert groups.num_cores() == cores


@pytest.mark.parametrize("name", ["/", "/../sibling", "/not/to/be/seen"])
def test_a_container_sees_its_own_group_as_the_root(tmp_path: Path, name: str) -> None:
    groups = Groups(tmp_path, name)
    groups.write(".", memory_max=f"{GIB}\n", memory_current="0\n", cpu_max="300000 100000\n")
    assert groups.available_bytes() == GIB
    assert groups.num_cores() == 3
