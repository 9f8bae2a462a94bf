"""Whether the hosts have memory for a copy: this process's limits, and what the others on its node want too."""

from __future__ import annotations

import os
import re
from pathlib import Path

from megatron_avatar.policy.backend import Backend

SLACK = 2 * 2**30  # left to everything else on a node


def enough(need: int, backend: Backend) -> bool:
    """Whether every node has room for the bytes that all of its ranks `need`; the same answer on all ranks."""
    asked = backend.all_gather_object((os.uname().nodename, need, available()))
    for node in {name for name, *_ in asked}:
        here = [(size, free) for name, size, free in asked if name == node]
        if sum(size for size, _ in here) + SLACK > min(free for _, free in here):
            return False
    return True


def available(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes that this node's processes may still take: of its memory, and of the limits that hold for this one."""
    found = re.search(r"^MemAvailable:\s+(\d+) kB", (proc / "meminfo").read_text(), re.M)
    free = [int(found[1]) * 1024] if found else []
    try:
        groups = [line.split(":", 2) for line in (proc / "self" / "cgroup").read_text().splitlines()]
    except OSError:
        groups = []
    for _, controllers, path in groups:
        if controllers == "":  # version 2
            free += _limits(cgroups, path, "memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            free += _limits(cgroups / "memory", path, "memory.limit_in_bytes", "memory.usage_in_bytes",
                            "total_inactive_file")  # fmt: skip
    return max(0, min(free, default=0))


def _limits(root: Path, path: str, limit: str, usage: str, cached: str) -> list[int]:
    """What each limit from a control group up to its root leaves; pages that only cache files are free."""
    left, folder = [], root / path.lstrip("/")
    while folder.is_relative_to(root):
        try:
            most = (folder / limit).read_text().strip()
            if most.isdecimal() and int(most) < 1 << 60:  # version 1 writes a huge number for none
                stat = re.search(rf"^{cached} (\d+)", (folder / "memory.stat").read_text(), re.M)
                left.append(int(most) - int((folder / usage).read_text()) + (int(stat[1]) if stat else 0))
        except OSError:
            pass  # no such group here: a container shows its own part of the tree
        folder = folder.parent
    return left
