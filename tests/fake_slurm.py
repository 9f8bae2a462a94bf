"""Slurm's commands as fakes on PATH that count their calls and fail as often as they are told, and a clock of ours."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_avatar.resilience import queue

TIMED_OUT = "slurm_load_jobs error: Socket timed out on send/recv operation"


class FakeSlurm:
    """Commands in `folder`, which is first on PATH; `now` is the clock, which sleeping turns."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.now = folder, 0.0

    def fake(self, name: str, *, says: str = "", fails: int = 0, reason: str = TIMED_OUT) -> Path:
        """`name` fails `fails` times with `reason`, then says `says`; the file that counts its calls."""
        count = self.folder / f"{name}.count"
        program = self.folder / name
        program.write_text(f"""#!/bin/bash
n=$(($(cat {count} 2>/dev/null || echo 0) + 1)); echo $n > {count}; echo "$@" >> {self.folder}/{name}.calls
((n > {fails})) || {{ echo "{reason}" >&2; exit 1; }}
echo "{says}"; env > {self.folder}/{name}.env
""")
        program.chmod(0o755)
        return count

    def calls(self, name: str) -> list[str]:
        """The arguments of every call so far."""
        path = self.folder / f"{name}.calls"
        return path.read_text().splitlines() if path.exists() else []

    def environment(self, name: str) -> dict[str, str]:
        """Of the latest call that went well."""
        lines = (self.folder / f"{name}.env").read_text().splitlines()
        return dict(line.split("=", 1) for line in lines if "=" in line)

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def fake_slurm(tmp_path, monkeypatch) -> FakeSlurm:
    slurm = FakeSlurm(tmp_path / "bin")
    slurm.folder.mkdir()
    monkeypatch.setenv("PATH", f"{slurm.folder}:{os.environ['PATH']}")
    monkeypatch.setattr(queue, "time", SimpleNamespace(monotonic=lambda: slurm.now, sleep=slurm.sleep))
    return slurm
