"""What of a node's memory is left: its own, and control groups of both versions, each with what only caches files."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_avatar.resilience import room

GIB = 2**30


def write(path: Path, text: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n")


@pytest.fixture
def node(tmp_path):
    """A node with 100 GiB to give, without a limit."""
    write(tmp_path / "proc/meminfo", f"MemTotal: 1 kB\nMemAvailable:   {100 * GIB // 1024} kB")
    write(tmp_path / "proc/self/cgroup", "0::/slurm/job_7/step_0")
    return SimpleNamespace(root=tmp_path, cgroups=tmp_path / "cgroup",
                           free=lambda: room.available(tmp_path / "proc", tmp_path / "cgroup"))


def test_a_node_without_limits(node):
    assert node.free() == 100 * GIB


def test_the_tightest_limit_above_the_process_counts(node):
    for name, limit, used, cached in (("step_0", "max", 9, 0), ("", 40 * GIB, 30 * GIB, 5 * GIB)):
        group = node.cgroups / "slurm/job_7" / name
        write(group / "memory.max", limit)
        write(group / "memory.current", used)
        write(group / "memory.stat", f"anon 1\ninactive_file {cached}")
    assert node.free() == 15 * GIB


def test_version_1(node):
    write(node.root / "proc/self/cgroup", "9:cpuset:/other\n4:memory:/slurm/uid_0/job_7")
    group = node.cgroups / "memory/slurm/uid_0/job_7"
    write(group / "memory.limit_in_bytes", 20 * GIB)
    write(group / "memory.usage_in_bytes", 12 * GIB)
    write(group / "memory.stat", f"inactive_file 7\ntotal_inactive_file {GIB}")
    assert node.free() == 9 * GIB
    write(group / "memory.limit_in_bytes", 2**63 - 4096)
    assert node.free() == 100 * GIB, "no limit"


def test_every_node_has_to_hold_all_of_its_ranks(monkeypatch):
    asked = [("a", 10, 25 + room.SLACK), ("a", 15, 25 + room.SLACK), ("b", 10, 10 + room.SLACK)]
    backend = SimpleNamespace(all_gather_object=lambda value: asked)
    monkeypatch.setattr(room, "available", lambda: 0)
    assert room.enough(10, backend)
    asked[0] = ("a", 10, 24 + room.SLACK)
    assert not room.enough(10, backend)
    asked[0], asked[2] = ("a", 10, 99 * GIB), ("b", 11, 10 + room.SLACK)
    assert not room.enough(10, backend)
